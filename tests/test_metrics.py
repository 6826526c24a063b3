"""Two-sample distances against closed forms, brute force and their own spread."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sde_score._checks import ArgumentError
from sde_score.metrics import (
    c2st,
    energy_distance,
    frechet_distance,
    median_bandwidth,
    mmd,
    sliced_wasserstein,
)

unit_mmd = partial(mmd, bandwidth=1.0)


def sliced(x, y):
    return sliced_wasserstein(jax.random.key(0), x, y, num_directions=16)


def gaussians(seed, n, m, d, shift=0.0):
    """n draws of N(0, I) and m of N(shift, I), the shift along every axis."""
    x_key, y_key = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x_key, (n, d)), shift + jax.random.normal(y_key, (m, d))


def gaussian_mmd2(shift, d, h):
    """2(E k(X, X') − E k(X, Y)), where X − Y ~ N(μ, 2I) and so
    E k(X, Y) = (h²/(h² + 2))^{d/2} exp(−|μ|²/2(h² + 2)).
    """
    peak = (h**2 / (h**2 + 2)) ** (d / 2)
    return 2 * peak * -np.expm1(-d * shift**2 / (2 * (h**2 + 2)))


def gaussian_energy(shift):
    """2E|X − Y| − 4/√π in one dimension, with X − Y ~ N(shift, 2) (a folded normal)."""
    folded = 2 / np.sqrt(np.pi) * np.exp(-(shift**2) / 4) + shift * (
        1 - 2 * stats.norm.cdf(-shift / np.sqrt(2))
    )
    return 2 * folded - 4 / np.sqrt(np.pi)


def brute_force(kernel, x, y):
    """The U-statistic by its three double sums."""
    xx, yy, xy = (
        kernel(np.linalg.norm(a[:, None] - b[None], axis=-1)) for a, b in ((x, x), (y, y), (x, y))
    )
    n, m = xy.shape
    same = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return same - 2 * xy.mean()


KERNELS = [
    pytest.param(unit_mmd, lambda r: np.exp(-(r**2) / 2), id="mmd"),
    pytest.param(energy_distance, lambda r: -r, id="energy"),
]


@pytest.mark.parametrize("d", [1, 3])
def test_mmd_of_shifted_gaussians(d):
    x, y = gaussians(0, 1000, 700, d, shift=0.7)
    value, stderr = mmd(x, y, bandwidth=1.3)
    exact = gaussian_mmd2(0.7, d, 1.3)
    assert abs(value - exact) < 5 * stderr
    assert exact > 6 * stderr  # so that a wrong sign or factor fails


def test_energy_distance_of_shifted_gaussians():
    value, stderr = energy_distance(*gaussians(1, 1000, 700, 1, shift=0.7))
    exact = gaussian_energy(0.7)
    assert abs(value - exact) < 5 * stderr
    assert exact > 6 * stderr


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_unbiased_in_small_samples(shift):
    """The mean of 4000 repetitions with 5 and 4 points, within 5 of its standard errors."""
    keys = jax.random.split(jax.random.key(2), 4000)

    def estimates(key):
        z = jax.random.normal(key, (9, 1))
        x, y = z[:5], z[5:] + shift
        return jnp.stack([unit_mmd(x, y).value, energy_distance(x, y).value])

    values = np.asarray(jax.jit(jax.vmap(estimates))(keys))
    error = values.mean(0) - [gaussian_mmd2(shift, 1, 1.0), gaussian_energy(shift)]
    assert np.all(np.abs(error) < 5 * values.std(0) / np.sqrt(len(values)))


@pytest.mark.parametrize(("distance", "kernel"), KERNELS)
def test_chunks_equal_the_double_sums(distance, kernel):
    """301 + 97 points are no multiple of the chunk."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(301, 3)), rng.normal(size=(97, 3)) + 0.3
    with jax.enable_x64(True):
        value = distance(x, y).value
    np.testing.assert_allclose(value, brute_force(kernel, x, y), atol=1e-12)


@pytest.mark.parametrize(("distance", "kernel"), KERNELS)
def test_stderr_is_the_leave_one_out_jackknife(distance, kernel):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 2)), rng.normal(size=(9, 2))

    def variance(replicates):
        return (len(replicates) - 1) * np.var(replicates)

    expected = np.sqrt(
        variance([brute_force(kernel, np.delete(x, i, 0), y) for i in range(12)])
        + variance([brute_force(kernel, x, np.delete(y, j, 0)) for j in range(9)])
    )
    with jax.enable_x64(True):
        stderr = distance(x, y).stderr
    np.testing.assert_allclose(stderr, expected, rtol=1e-12)


DISTANCES = [
    pytest.param(lambda key, x, y: unit_mmd(x, y), id="mmd"),
    pytest.param(lambda key, x, y: energy_distance(x, y), id="energy"),
    pytest.param(partial(sliced_wasserstein, num_directions=16), id="sliced_wasserstein"),
]


def spread_and_stderr(distance, shift):
    """Standard deviation of the value and root mean squared standard error, over 200 keys."""

    def one(key):
        data_key, key = jax.random.split(key)
        z = jax.random.normal(data_key, (160, 2))
        return distance(key, z[:100], z[100:] + shift)

    values, stderrs = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20))(
        jax.random.split(jax.random.key(3), 200)
    )
    return np.std(values), np.sqrt(np.mean(stderrs**2))


@pytest.mark.parametrize("distance", DISTANCES)
def test_stderr_matches_the_spread(distance):
    """A standard deviation from 200 draws is known to 5 %: 1 ± 0.25 is 5 of those."""
    spread, stderr = spread_and_stderr(distance, 0.7)
    assert 0.75 < stderr / spread < 1.25


@pytest.mark.parametrize("distance", DISTANCES[:2])
def test_stderr_is_conservative_where_the_distributions_are_equal(distance):
    """The degenerate U-statistic: √2 in theory; ± 20 % as its spread has heavier tails."""
    spread, stderr = spread_and_stderr(distance, 0.0)
    assert 1.1 < stderr / spread < 1.7


def test_median_bandwidth():
    x, y = gaussians(4, 100, 60, 2)
    z = np.concatenate([x, y])
    distances = np.linalg.norm(z[:, None] - z[None], axis=-1)[np.triu_indices(160, 1)]
    np.testing.assert_allclose(median_bandwidth(x, y), np.median(distances), rtol=1e-6)
    with_default, with_median = mmd(x, y), mmd(x, y, bandwidth=median_bandwidth(x, y))
    np.testing.assert_array_equal(with_default, with_median)
    # |X − X'|² ~ 2χ²₂ has the median 4 ln 2; 500 of the 1000 points give its root to about 2 %.
    many = gaussians(5, 700, 300, 2)
    np.testing.assert_allclose(median_bandwidth(*many), np.sqrt(4 * np.log(2)), rtol=0.1)


def test_float32_far_from_the_origin():
    """A shift by 2^10 rounds the data by 6e-5, and the distances by no more than that."""
    x, y = gaussians(6, 300, 300, 2, shift=0.5)
    for distance in (unit_mmd, energy_distance, sliced):
        near, far = distance(x, y), distance(x + 1024.0, y + 1024.0)
        np.testing.assert_allclose(far, near, atol=1e-4)


def test_equal_points_are_no_nan():
    x = jnp.ones((8, 2))
    for distance in (mmd, energy_distance, sliced):
        np.testing.assert_allclose(distance(x, x), (0.0, 0.0), atol=1e-6)  # float32


@pytest.mark.parametrize("d", [1, 3])
def test_sliced_wasserstein_of_a_shift(d):
    """W₂ of a slice is |θᵀμ| and E(θᵀμ)² = |μ|²/d; y = x + μ exactly, so only θ is random."""
    x, _ = gaussians(7, 300, 4, d)
    shift = jnp.array([[3.0, 4.0, 0.0]])[:, :d]
    value, stderr = sliced_wasserstein(jax.random.key(1), x, x + shift, num_directions=128)
    exact = float(jnp.linalg.norm(shift)) / np.sqrt(d)
    assert abs(value - exact) < 5 * stderr + 1e-5  # float32, where d = 1 leaves no randomness
    # With independent samples the upward bias is about 1/(n|μ|), 5 % of a standard error.
    y = shift + gaussians(8, 300, 4, d)[0]
    value, stderr = sliced_wasserstein(jax.random.key(2), x, y, num_directions=128)
    assert abs(value - exact) < 5 * stderr


def test_sliced_wasserstein_in_one_dimension_is_the_sorted_formula():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=60), rng.normal(size=40) + 0.2
    # Repeat both to 120 points: the empirical laws stay, and W₂² is the mean over sorted pairs.
    gaps = np.repeat(np.sort(x), 2) - np.repeat(np.sort(y), 3)
    with jax.enable_x64(True):
        value, _ = sliced_wasserstein(jax.random.key(0), x, y, num_directions=2)
    np.testing.assert_allclose(value, np.sqrt(np.mean(gaps**2)), rtol=1e-12)


def test_the_floor_of_sliced_wasserstein():
    """Two exact samples: between one and two standard deviations times (1/n + 1/m)^½."""
    value, _ = sliced_wasserstein(jax.random.key(3), *gaussians(9, 600, 300, 2))
    assert 1.0 < value / np.sqrt(1 / 600 + 1 / 300) < 2.0


def test_events_are_flattened_and_jit_changes_nothing():
    x, y = gaussians(10, 20, 30, 6, shift=0.3)
    for distance in (mmd, energy_distance, sliced):
        images = jax.jit(distance)(x.reshape(20, 3, 2, 1), y.reshape(30, 3, 2, 1))
        np.testing.assert_allclose(images, distance(x, y), rtol=1e-4)  # another order of sums


def test_c2st_of_equal_distributions():
    accuracy, stderr = c2st(*gaussians(12, 300, 300, 2))
    np.testing.assert_allclose(stderr, 0.5 / np.sqrt(600), rtol=0.01)
    assert abs(accuracy - 0.5) < 4 * stderr


def test_c2st_nears_the_accuracy_of_bayes():
    """Φ(|μ|/2) for N(0, I) and N(μ, I); unequal sizes are cut to 500. Trees lose up to 3 %."""
    x, y = gaussians(13, 500, 900, 2, shift=2 / np.sqrt(2))
    accuracy, stderr = c2st(x, y)
    bayes = stats.norm.cdf(1.0)
    assert bayes - 0.03 - 4 * stderr < accuracy < bayes + 4 * stderr
    assert c2st(x, y) == (accuracy, stderr)


def test_c2st_takes_a_classifier():
    """Logistic regression is the Bayes classifier here, and blind to a change of scale."""
    from sklearn.linear_model import LogisticRegression

    x, y = gaussians(14, 500, 500, 2, shift=2 / np.sqrt(2))
    accuracy, stderr = c2st(x, y, classifier=LogisticRegression())
    assert abs(accuracy - stats.norm.cdf(1.0)) < 4 * stderr
    accuracy, stderr = c2st(x, 3 * x[::-1], classifier=LogisticRegression())
    assert accuracy < 0.6 < c2st(x, 3 * x[::-1]).value


def test_c2st_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r"pip install 'sde_score\[experiments\]'"):
        c2st(*gaussians(15, 10, 10, 2))


@pytest.mark.parametrize("distance", [mmd, energy_distance, sliced, c2st])
def test_bad_samples(distance):
    x = jnp.ones((6, 2))
    with pytest.raises(ArgumentError, match=r"`y.shape\[1:\]` must have shape \(2,\); got \(3,\)"):
        distance(x, jnp.ones((6, 3)))
    with pytest.raises(ArgumentError, match=r"`len\(y\)` must be .* at least 4; got 3"):
        distance(x, x[:3])
    with pytest.raises(ArgumentError, match=r"`len\(x\)` must be .* at least 4; got 0"):
        distance(jnp.float32(1.0), x)
    with pytest.raises(ArgumentError, match="`y` must be finite; 12 of its 12"):
        distance(x, x * jnp.nan)
    with pytest.raises(ArgumentError, match="`x` must be floating point; got int32"):
        distance(x.astype(int), x)


def test_bad_options():
    x = jnp.ones((6, 2))
    with pytest.raises(ArgumentError, match="`bandwidth` must be finite and above 0; got -1"):
        mmd(x, x, bandwidth=-1.0)
    with pytest.raises(ArgumentError, match=r"`bandwidth` must have shape \(\); got \(2,\)"):
        mmd(x, x, bandwidth=jnp.ones(2))
    with pytest.raises(ArgumentError, match="`num_directions` must be .* at least 2; got 1"):
        sliced_wasserstein(jax.random.key(0), x, x, num_directions=1)
    with pytest.raises(ArgumentError, match="`key` must be a typed key"):
        sliced_wasserstein(0, x, x)


def test_the_frechet_distance_of_two_gaussians():
    """Of 60 pairs of samples: the closed form within 5 standard errors, but for a bias of O(d²/n)
    that 20,000 points make small; and an error bar that is the spread over pairs.
    """
    factor = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    shift = jnp.array([[0.5, -0.2]])

    def draw(key):
        x, y = jax.random.normal(key, (2, 2_000, 2))
        return x, shift + 1.5 * y @ factor.T

    one = lambda key: frechet_distance(*draw(key))  # noqa: E731
    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 60))
    root = np.sqrt(np.linalg.eigvalsh(2.25 * factor @ factor.T)).sum()
    truth = 0.25 + 0.04 + 2.0 + 2 * 2.25 - 2 * root
    spread = found.value.std(ddof=1)
    assert abs(found.value.mean() - truth) < 5 * spread / np.sqrt(60)
    assert 0.7 * spread < found.stderr.mean() < 1.4 * spread  # both known to some 10 %
    x, _ = draw(jax.random.key(1))
    assert abs(frechet_distance(x, x).value) < 1e-5
