import functools
import math
import sys
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.integrate import simpson
from scipy.special import i0e
from scipy.stats import chi2

from sde_score.data import (
    batches,
    checkerboard,
    circles,
    digits,
    eight_gaussians,
    patches,
    pinwheel,
    standardize,
    swiss_roll,
    two_moons,
    two_spirals,
)
from sde_score.data.batches import _divmod_product
from sde_score.data.toy import _twist

DENSITIES = {
    "two_moons": two_moons,
    "circles": circles,
    "swiss_roll": swiss_roll,
    "eight_gaussians": eight_gaussians,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "two_spirals": two_spirals,
}
all_densities = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES.keys())

CELLS, FINE = 20, 8  # a grid of 20 × 20 cells on [-4, 4]², each of 8 × 8 midpoints 0.05 apart
AREA = (8 / CELLS / FINE) ** 2


@functools.cache
def draw(density):
    """20,000 samples, log p at each, and log p at the midpoints as [cells, fine, cells, fine]."""
    samples = jax.jit(density, static_argnums=1)(jax.random.key(0), 20_000)
    ticks = -4 + (jnp.arange(CELLS * FINE) + 0.5) * 8 / (CELLS * FINE)
    grid = jnp.stack(jnp.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)
    log_prob = jax.jit(jax.vmap(density.log_prob))(jnp.concatenate([samples, grid]))
    log_prob = np.asarray(log_prob, np.float64)
    return samples, log_prob[:20_000], log_prob[20_000:].reshape(CELLS, FINE, CELLS, FINE)


def assert_counts(counts, expected, constraints=1):
    """Pearson's statistic stays below its 1 - 1e-6 quantile."""
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert statistic < chi2.ppf(1 - 1e-6, np.size(counts) - constraints)


@all_densities
def test_density_is_normalised(density):
    """The midpoint rule is exact on the board, and far better than 1e-3 where p is smooth."""
    assert abs(np.sum(np.exp(draw(density)[2])) * AREA - 1) < 1e-3


@all_densities
def test_samples_follow_the_density(density):
    """E[-log p] of samples is the grid's entropy, and cell counts follow its probabilities."""
    samples, log_prob, grid_log_prob = draw(density)
    prob = np.exp(grid_log_prob)
    entropy = -np.sum(prob * np.where(prob > 0, grid_log_prob, 0)) * AREA
    stderr = np.std(log_prob) / np.sqrt(log_prob.size)
    assert abs(-np.mean(log_prob) - entropy) < 5 * stderr + 1e-4  # 1e-4: the grid, float32 sums

    expected = np.sum(prob, axis=(1, 3)).ravel() * AREA * len(samples)
    x, y = np.asarray(samples, np.float64).T
    counts = np.histogram2d(x, y, CELLS, [[-4, 4], [-4, 4]])[0].ravel()
    rare = expected < 5
    counts, expected = (np.append(n[~rare], n[rare].sum()) for n in (counts, expected))
    assert_counts(counts, expected + 1e-3)  # where nothing is expected, one sample is too many


@all_densities
def test_densities_have_about_unit_scale(density):
    """The documented scale: 0.2 allows for the board (1.15), 0.35 for the swiss roll's mean."""
    samples = np.asarray(draw(density)[0])
    np.testing.assert_allclose(np.std(samples, axis=0), 1, atol=0.2)
    np.testing.assert_allclose(np.mean(samples, axis=0), 0, atol=0.35)
    assert np.all(np.abs(samples) < 4)


@all_densities
def test_sample_i_depends_on_key_and_i_only(density):
    with jax.debug_key_reuse(True):
        few = jax.jit(density, static_argnums=1)(jax.random.key(0), 3)
    np.testing.assert_allclose(few, draw(density)[0][:3], atol=1e-6)  # fused float32 sums


def test_densities_without_jit():
    eager = checkerboard(jax.random.key(0), 3)
    np.testing.assert_allclose(eager, draw(checkerboard)[0][:3], atol=1e-6)


@all_densities
def test_densities_in_float64(density):
    samples, log_prob, _ = draw(density)
    with jax.enable_x64(True):
        log_prob64 = jax.jit(density.log_prob)(jnp.asarray(samples[0], jnp.float64))
        assert log_prob64.dtype == jnp.float64
        assert jax.eval_shape(lambda key: density(key, 3), jax.random.key(0)).dtype == jnp.float64
        assert jax.eval_shape(density.log_prob, samples[0]).dtype == jnp.float32
    np.testing.assert_allclose(log_prob[0], log_prob64, atol=1e-4)  # float32 squares


def test_circles_match_the_bessel_form():
    """A circle of radius R with noise σ has p(x) = e^{−(r² + R²)/2σ²} I₀(rR/σ²) / 2πσ²."""
    radius = np.linspace(0.0, 3.0, 61)
    scaled = [np.exp(-50 * (radius - r) ** 2) * i0e(100 * radius * r) for r in (0.8, 1.8)]
    want = np.log(sum(scaled) / 2 * 100 / (2 * math.pi))
    with jax.enable_x64(True):
        points = jnp.stack([0.6 * radius, -0.8 * radius], axis=1)
        log_prob = jax.jit(jax.vmap(circles.log_prob))(points)
    np.testing.assert_allclose(log_prob, want, atol=1e-8)


@pytest.mark.parametrize(
    ("density", "arm", "noise", "symmetric"),
    [
        (
            two_moons,
            lambda u: (1.15 * (np.cos(np.pi * u) - 0.5), 2 * np.sin(np.pi * u) - 0.5),
            0.1,
            1,
        ),
        (swiss_roll, lambda u: spiral(1.5 * np.pi * (1 + 2 * u), 7), 0.1, 0),
        (two_spirals, lambda u: spiral(np.pi * np.sqrt(0.25 + 8.75 * u), 4.5), 0.08, 1),
    ],
    ids=["two_moons", "swiss_roll", "two_spirals"],
)
def test_open_curves_match_a_fine_quadrature(density, arm, noise, symmetric):
    """Against Simpson's rule on 20,001 nodes, whose error is about (spacing/noise)⁴ < 1e-8."""
    curve = np.stack(arm(np.linspace(0, 1, 20_001)), axis=1)
    with jax.enable_x64(True):
        points = jax.random.uniform(jax.random.key(0), (20, 2), minval=-2.5, maxval=2.5)
        got = np.asarray(jax.jit(jax.vmap(density.log_prob))(points))
    arms = [curve, -curve] if symmetric else [curve]
    squares = [np.sum((np.asarray(points)[:, None] - arm[None]) ** 2, axis=2) for arm in arms]
    prob = (
        np.mean([simpson(np.exp(-s / (2 * noise**2)), axis=1) for s in squares], axis=0) / 20_000
    )
    np.testing.assert_allclose(got, np.log(prob / (2 * np.pi * noise**2)), atol=1e-6)


def spiral(angle, pitch):
    return angle * np.cos(angle) / pitch, angle * np.sin(angle) / pitch


def test_pinwheel_twist_keeps_areas_and_radii():
    points = jax.random.normal(jax.random.key(4), (100, 2))
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: _twist(x, 0.35))))(points)
    np.testing.assert_allclose(np.linalg.det(jacobians), 1, atol=1e-5)
    turned = np.asarray(jax.jit(jax.vmap(lambda x: _twist(x, 0.35)))(points))
    points = np.asarray(points)
    norms = np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), norms, rtol=1e-6)
    angle = np.arctan2(turned[:, 1], turned[:, 0]) - np.arctan2(points[:, 1], points[:, 0])
    np.testing.assert_allclose(np.cos(angle), np.cos(0.35 * norms**2), atol=1e-5)


def test_checkerboard_is_minus_infinity_off_the_board():
    inside, outside = jnp.array([0.5, 0.5]), jnp.array([[-0.5, 0.5], [2.5, 0.5], [0.5, -2.5]])
    np.testing.assert_allclose(checkerboard.log_prob(inside), -math.log(8), rtol=1e-6)
    assert np.all(np.isneginf(jax.vmap(checkerboard.log_prob)(outside)))


def test_digits_split_is_fixed_and_complete():
    train, test = digits()
    assert train.images.shape == (1500, 8, 8, 1) and test.images.shape == (297, 8, 8, 1)
    for part in (train, test):
        assert part.images.dtype == jnp.uint8 and part.labels.dtype == jnp.int32
        np.testing.assert_array_equal(np.unique(part.images), np.arange(17))
        np.testing.assert_array_equal(np.unique(part.labels), np.arange(10))
    assert int(jnp.sum(train.images, dtype=int)) + int(jnp.sum(test.images, dtype=int)) == 561_718
    np.testing.assert_array_equal(test.labels[:10], [0, 4, 4, 8, 4, 9, 2, 6, 8, 4])


def test_digits_say_how_to_install_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'sde_score\[experiments\]'"):
        digits()


def test_patches_of_train_and_test_share_no_column():
    """On photographs whose pixels name their column, photograph and row."""
    column, row = np.arange(640)[None], np.arange(427)[:, None]
    places = [
        np.stack(np.broadcast_arrays(column % 256, column // 256 + 8 * i, row // 2), axis=-1)
        for i in range(2)
    ]
    photographs = types.SimpleNamespace(images=[place.astype(np.uint8) for place in places])
    with unittest.mock.patch("sklearn.datasets.load_sample_images", lambda: photographs):
        train, test = patches(stride=16)
    assert train.images.shape == (2 * 25 * 7 * 4, 32, 32, 3)
    columns = {}
    for name, part in (("train", train), ("test", test)):
        images = np.asarray(part.images, int)
        seen = images[..., 0] + 256 * (images[..., 1] % 8)
        np.testing.assert_array_equal(np.diff(seen, axis=2), 1)  # a patch is in one piece
        assert np.all(np.isin(np.diff(images[:, :, 0, 2], axis=1), [0, 1]))
        np.testing.assert_array_equal(images[:, 0, 0, 1] // 8, part.labels)
        columns[name] = set(seen.ravel().tolist())
    assert columns["test"] == {c for c in range(640) if c % 160 >= 128}
    assert columns["train"] == set(range(640)) - columns["test"]
    corners = {(*p[0, 0].tolist(),) for p in np.asarray(test.images)}
    assert len(corners) == len(test.images) == 104  # disjoint


def test_patches_are_fixed():
    train, test = patches()
    assert train.images.dtype == test.images.dtype == jnp.uint8
    assert train.images.shape == (8976, 32, 32, 3) and test.images.shape == (104, 32, 32, 3)
    sums = [np.asarray(x, int).sum() for x in (train.images[0], test.images[-1])]
    np.testing.assert_allclose(sums, [631230, 123420], rtol=1e-3)  # JPEG decoders round apart
    with pytest.raises(ValueError, match="`stride` must be a Python integer of at least 1; got 0"):
        patches(stride=0)


def table():
    """Columns of unlike scales, one with an offset that a plain float32 sum would round."""
    x = jax.random.normal(jax.random.key(5), (4_096, 3)) * jnp.array([[0.1, 1.0, 30.0]])
    return x + jnp.array([[0.0, 1_000.0, -5.0]])


def test_standardize_gives_zero_mean_and_unit_variance():
    x = table()
    z = np.asarray(jax.vmap(standardize(x))(x))
    # An entry of 1000 is rounded to 6e-5, and its column's mean likewise: 2e-4 covers both.
    np.testing.assert_allclose(np.mean(z, axis=0, dtype=np.float64), 0, atol=2e-4)
    np.testing.assert_allclose(np.std(z, axis=0, dtype=np.float64), 1, atol=2e-4)


def test_standardizer_inverts_and_knows_its_jacobian():
    x = table()
    scale = standardize(x)
    np.testing.assert_allclose(
        jax.vmap(lambda x: scale.inverse(scale(x)))(x), x, rtol=1e-6, atol=1e-6
    )
    sign, log_det = jnp.linalg.slogdet(jax.jacfwd(scale)(x[0]))
    assert sign == 1
    np.testing.assert_allclose(scale.log_det, log_det, rtol=1e-5)


def test_standardizer_takes_log_densities_to_data_units():
    """log N(z; 0, 1) + log_det = log N(x; mean, std²)."""
    x = 3 + 2 * jax.random.normal(jax.random.key(6), (500, 1))
    scale = standardize(x)
    got = jax.scipy.stats.norm.logpdf(scale(x[0]))[0] + scale.log_det
    want = jax.scipy.stats.norm.logpdf(x[0], scale.mean, scale.std)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_standardizer_travels_through_jit():
    x = table()
    jitted = jax.jit(lambda x: jax.vmap(standardize(x))(x))(x)
    np.testing.assert_allclose(
        jitted, jax.vmap(standardize(x))(x), atol=2e-4
    )  # offset column again
    twice = jax.jit(lambda scale: scale.log_det * 2)(standardize(x))
    np.testing.assert_allclose(twice, 2 * standardize(x).log_det, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (jnp.arange(6).reshape(3, 2), "`x` must be floating point; got int32"),
        (jnp.zeros((0, 2)), "`x` must not be empty"),
        (jnp.array([[1.0, jnp.nan], [2.0, 3.0]]), "`x` must be finite; 1 of its 4 values"),
        (jnp.array([[1.0, 0.1], [2.0, 0.1]]), r"columns \[1\] are constant"),
        (jnp.array([1.0, 2.0]), r"table of shape \[n, d\]; got \(2,\)"),
    ],
    ids=["integer", "empty", "nan", "constant", "vector"],
)
def test_standardize_refuses(x, match):
    with pytest.raises(ValueError, match=match):
        standardize(x)


def test_standardizer_takes_one_example():
    scale = standardize(table())
    with pytest.raises(ValueError, match=r"`x` must have shape \(3,\); got \(4096, 3\).*jax.vmap"):
        scale(table())


def epochs(key, num, batch_size, num_epochs):
    """The entries of the first epochs, [num_epochs, num], from whole batches."""
    num_steps = num_epochs * num // batch_size
    batch = batches(key, jnp.arange(num), batch_size)
    # As an argument, as in `fit`: a constant would be folded, slowly, by the compiler.
    run = jax.jit(lambda batch, steps: jax.vmap(batch)(steps))
    return np.asarray(run(batch, jnp.arange(num_steps))).reshape(num_epochs, num)


@pytest.mark.parametrize(
    ("num", "batch_size"), [(1, 1), (2, 1), (7, 7), (10, 4), (12, 5), (100, 32), (1_013, 64)]
)
def test_every_epoch_is_a_permutation(num, batch_size):
    """Also where batches straddle epochs; 1013 is prime, so entries leave [0, n) and walk back."""
    orders = epochs(jax.random.key(0), num, batch_size, batch_size)
    np.testing.assert_array_equal(
        np.sort(orders, axis=1), np.tile(np.arange(num), (batch_size, 1))
    )


def test_epochs_and_keys_differ():
    """Two uniform orders agree at a Poisson(1) number of places: 10 has probability 1e-7."""
    first, second = epochs(jax.random.key(0), 1_013, 1_013, 2)
    other = epochs(jax.random.key(1), 1_013, 1_013, 1)[0]
    for a, b in ((first, second), (first, other), (first, np.arange(1_013))):
        assert np.sum(a == b) < 10


@pytest.mark.parametrize("num", [5, 12, 16])
def test_orders_are_uniform(num):
    """Each entry is as often at each place, and each ordered pair as often at the first two."""
    orders = epochs(jax.random.key(2), num, num, 20_000)
    places = np.stack([np.bincount(column, minlength=num) for column in orders.T])
    assert_counts(places, np.full((num, num), 20_000 / num), constraints=2 * num - 1)
    pairs = np.zeros((num, num))
    np.add.at(pairs, (orders[:, 0], orders[:, 1]), 1)
    pairs = pairs[~np.eye(num, dtype=bool)]
    assert_counts(pairs, np.full(pairs.shape, 20_000 / pairs.size))


def test_neighbours_in_the_data_are_spread():
    """Gaps between successive entries are triangular, as between independent draws."""
    order = epochs(jax.random.key(3), 20_000, 20_000, 1)[0] / 20_000
    gaps = np.sort(np.abs(np.diff(order)))
    law = 1 - (1 - gaps) ** 2
    deviation = np.max(np.abs(law - (np.arange(gaps.size) + 0.5) / gaps.size))
    assert deviation < 2.5 / np.sqrt(gaps.size)  # Kolmogorov: exceeded with probability 7e-6


def test_batches_are_a_pure_function_of_key_and_step():
    """Eager, jitted, in a scan and in a fori_loop, in any order, without reusing a key."""
    with jax.debug_key_reuse(True):
        batch = batches(jax.random.key(4), jnp.arange(50), 16)
        jitted = np.stack([jax.jit(batch)(step) for step in reversed(range(8))])[::-1]
        scanned = jax.lax.scan(lambda _, step: (None, batch(step)), None, jnp.arange(8))[1]
        total = jax.lax.fori_loop(0, 8, lambda i, total: total + batch(i), jnp.zeros(16, int))
        eager = batch(3)
    np.testing.assert_array_equal(jitted, scanned)
    np.testing.assert_array_equal(np.sum(jitted, axis=0), total)
    np.testing.assert_array_equal(eager, scanned[3])


def test_batch_order_is_the_same_on_every_version():
    batch = jax.jit(batches(jax.random.key(0), jnp.arange(10), 10))
    np.testing.assert_array_equal(batch(0), [2, 3, 7, 9, 1, 5, 0, 6, 8, 4])


def test_labels_ride_along():
    data = {"x": np.arange(30.0).reshape(10, 3), "label": jnp.arange(10)}
    batch = jax.jit(batches(jax.random.key(5), data, 4))(3)
    assert batch["x"].shape == (4, 3)
    np.testing.assert_array_equal(batch["x"][:, 0], 3.0 * batch["label"])


def test_batches_travel_through_jit_without_recompiling():
    traces = []

    @jax.jit
    def mean(batch, step):
        traces.append(step)
        return jnp.mean(batch(step))

    data = jnp.arange(20.0)
    for seed in range(3):
        batch = batches(jax.random.key(seed), data + seed, 10)
        assert isinstance(batch, Partial)
        two = mean(batch, jnp.int32(0)) + mean(batch, jnp.int32(1))
        np.testing.assert_allclose(two, 2 * (9.5 + seed), rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("num", "factor"),
    [(1, 1), (10, 10), (10_000, 256), (60_001, 60_001), (2**24 + 1, 2**20), (2**30, 2**30)],
)
def test_long_runs_do_not_overflow(num, factor):
    """Against Python's integers."""
    steps = np.random.default_rng(0).integers(0, 2**32, 50, np.uint32)
    steps = np.append(steps, np.uint32([0, 1, 2**31 - 1, 2**32 - 1]))
    got = jax.jit(jax.vmap(lambda step: _divmod_product(step, factor, num)))(jnp.asarray(steps))
    want = np.array([divmod(int(step) * factor, num) for step in steps]).T
    np.testing.assert_array_equal(np.stack(got), want)


def test_last_steps_hold_whole_epochs():
    batch = jax.jit(batches(jax.random.key(6), jnp.arange(10), 10))
    for step in (jnp.int32(2**31 - 1), jnp.uint32(2**32 - 1)):
        np.testing.assert_array_equal(np.sort(batch(step)), np.arange(10))


@pytest.mark.parametrize(
    ("data", "batch_size", "match"),
    [
        (jnp.ones((4, 2)), 0, "`batch_size` must be a Python integer of at least 1; got 0"),
        (jnp.ones((4, 2)), 5, "`batch_size` must be at most the number of examples, 4; got 5"),
        (
            (jnp.ones((4, 2)), jnp.arange(3)),
            2,
            r"share their leading axis.*got shapes \[\(4, 2\), \(3,\)\]",
        ),
        (jnp.float32(1), 1, r"share their leading axis.*got shapes \[\(\)\]"),
        ((), 1, "share their leading axis"),
        (jnp.zeros((0, 2), int), 1, "must have from 1 to 2³⁰ examples; got 0"),
        (jnp.array([1.0, jnp.inf]), 1, "`data` must be finite; 1 of its 2"),
    ],
    ids=["zero", "too-large", "unequal", "scalar", "no-leaves", "empty", "infinite"],
)
def test_batches_refuse(data, batch_size, match):
    with pytest.raises(ValueError, match=match):
        batches(jax.random.key(0), data, batch_size)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="`key` must be a typed key"):
        batches(jnp.zeros(2, jnp.uint32), jnp.ones(3), 1)
    with pytest.raises(ValueError, match="`step` must be one integer"):
        batches(jax.random.key(0), jnp.ones(3), 1)(0.5)
    with pytest.raises(ValueError, match="`step` must be one integer"):
        batches(jax.random.key(0), jnp.ones(3), 1)(jnp.arange(2))
    with pytest.raises(ValueError, match="`key` must be a typed key"):
        two_moons(0, 10)
    with pytest.raises(ValueError, match="`num` must be a Python integer"):
        two_moons(jax.random.key(0), 2.5)
    with pytest.raises(ValueError, match=r"`x` must have shape \(2,\); got \(5, 2\).*jax.vmap"):
        two_moons.log_prob(jnp.zeros((5, 2)))
