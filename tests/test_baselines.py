"""Kernel estimates of a score against their closed formulas, brute force and the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sde_score as ss

POINTS = np.array([[0.0, 1.0], [0.6, -0.4], [-1.1, 0.3], [0.2, 0.1]])
WIDTHS = [ss.scott_bandwidth, ss.silverman_bandwidth, ss.cross_validated_bandwidth]
WIDTHS += [ss.propose_sigma]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def kernel(x, y, h):
    return jnp.exp(-jnp.sum((x - y) ** 2) / (2 * h**2))


def matrix(x, y, h):
    return jax.vmap(lambda a: jax.vmap(lambda b: kernel(a, b, h))(y))(x)


def leave_one_out(x, h):
    """For every width of h, without the constant."""
    n, d = x.shape
    squares = np.sum((x[:, None] - x[None]) ** 2, axis=-1) + np.diag(np.full(n, np.inf))
    sums = [np.logaddexp.reduce(-squares / (2 * width**2), axis=1) for width in h]
    return np.mean(sums, axis=1) - d * np.log(h)


def test_rules_of_thumb_in_closed_form(x64, rng):
    """Coordinates of variances 1 and 7 have a mean variance of 4."""
    n, d = 50, 2
    x = rng.normal(size=(n, d))
    x = (x - x.mean(0)) / x.std(0, ddof=1) * np.sqrt([1.0, 7.0]) + 5.0
    scott = n ** (-1 / 6) * 2.0
    np.testing.assert_allclose(ss.scott_bandwidth(x), scott, rtol=1e-12)
    np.testing.assert_allclose(ss.silverman_bandwidth(x), scott, rtol=1e-12)  # 4/(d + 2) = 1
    x = rng.normal(size=(30, 3, 2))
    ratio = ss.silverman_bandwidth(x) / ss.scott_bandwidth(x)
    np.testing.assert_allclose(ratio, (4 / 8) ** (1 / 10), rtol=1e-12)  # d = 6


@pytest.mark.parametrize("shape", [(300, 1), (200, 2), (60, 10)])
def test_cross_validation_maximises_the_leave_one_out_likelihood(x64, shape, rng):
    """Two clusters, one narrow, so that no rule of thumb is near; the promised 1 %."""
    x = rng.normal(size=shape)
    x[: shape[0] // 2] = 20.0 + 0.1 * x[: shape[0] // 2]
    h = float(ss.cross_validated_bandwidth(x))
    grid = np.geomspace(0.01, 30.0, 200)
    best = grid[np.argmax(leave_one_out(x, grid))]
    near = best * np.exp(np.linspace(-0.05, 0.05, 101))
    assert abs(np.log(h / near[np.argmax(leave_one_out(x, near))])) < 0.012
    assert h < 0.5 * ss.scott_bandwidth(x)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_scale_with_the_data(x64, width, rng):
    x = rng.normal(size=(40, 3))
    np.testing.assert_allclose(width(7.0 * x + 2.0), 7.0 * width(x), rtol=1e-9)


def test_the_proposed_sigma_is_a_sixth_of_the_scale_of_a_part():
    """Of a normal of standard deviation 1; of modes of 0.175, 1.4 from the centre. The likelihood
    is flat at its top, hence the width of the bounds.
    """
    normal_key, modes_key = jax.random.split(jax.random.key(1))
    sigma = ss.propose_sigma(jax.random.normal(normal_key, (2_000, 3)))
    assert 0.8 / 6 < sigma < 1.3 / 6
    sigma = ss.propose_sigma(ss.data.eight_gaussians(modes_key, 2_000))
    assert 0.175 / 6 < sigma < 2 * 0.175 / 6


def test_kernel_density_is_a_mixture_of_equal_normals(x64, rng):
    h, n, d = 0.4, *POINTS.shape
    gmm = ss.GaussianMixture(np.full(n, 1 / n), POINTS, np.tile(h**2 * np.eye(d), (n, 1, 1)))
    log_prob, score = ss.kernel_density_log_prob(POINTS, h), ss.kernel_density_score(POINTS, h)
    for x in jnp.asarray(rng.normal(size=(5, d))):
        np.testing.assert_allclose(log_prob(x), gmm.log_prob(x), rtol=1e-12)
        np.testing.assert_allclose(score(x), gmm.score(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(score(x), jax.grad(log_prob)(x), rtol=1e-12, atol=1e-12)


def test_kernel_density_far_from_the_data(x64):
    """The nearest point alone pulls; no density underflows."""
    x = jnp.array([300.0, 1.0])
    score = ss.kernel_density_score(POINTS, 0.1)(x)
    np.testing.assert_allclose(score, (POINTS[1] - x) / 0.01, rtol=1e-12)
    assert np.isfinite(ss.kernel_density_log_prob(POINTS, 0.1)(x))


@pytest.mark.parametrize("dim", [1, 2])
def test_kernel_density_integrates_to_one(x64, dim):
    """The midpoint rule is exact to rounding for a smooth function that vanishes at the ends."""
    edge = np.linspace(-6.0, 6.0, 121)[:-1] + 0.05
    grid = np.stack(np.meshgrid(*[edge] * dim), axis=-1).reshape(-1, dim)
    log_prob = jax.vmap(ss.kernel_density_log_prob(POINTS[:, :dim], 0.4))(grid)
    np.testing.assert_allclose(np.exp(log_prob).sum() * 0.1**dim, 1.0, rtol=1e-12)


def test_images_are_points_too(x64, rng):
    images = rng.normal(size=(9, 2, 3))
    flat, x = images.reshape(9, 6), rng.normal(size=(2, 3))
    for make in (lambda x: ss.kernel_density_score(x, 0.7), ss.stein_score):
        expected = make(flat)(x.reshape(6)).reshape(2, 3)
        np.testing.assert_allclose(make(images)(x), expected, rtol=1e-12)


def test_stein_scores_solve_the_stein_identity(x64):
    """Σ_j k(x_i, x_j) G_j + ridge G_i + Σ_j ∇_{x_j} k(x_i, x_j) = 0, the gradient by autodiff.

    A new point solves it as a row of the system with that point in it.
    """
    h, ridge = 0.8, 0.3
    x, new = jnp.asarray(POINTS), jnp.array([0.5, 0.5])

    def solve(x):
        along = jax.grad(kernel, argnums=1)
        pull = jax.vmap(lambda a: jax.vmap(lambda b: along(a, b, h))(x).sum(0))(x)
        return -jnp.linalg.solve(matrix(x, x, h) + ridge * jnp.eye(len(x)), pull)

    score_fn = ss.stein_score(x, bandwidth=h, ridge=ridge)
    *_, scores = score_fn.args
    np.testing.assert_allclose(scores, solve(x), rtol=1e-11)
    expected = solve(jnp.concatenate([x, new[None]]))[-1]
    np.testing.assert_allclose(score_fn(new), expected, rtol=1e-11)


def test_the_default_width_of_stein_is_the_median_distance(x64, rng):
    x = rng.normal(size=(30, 2))
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(30, 1)]
    _, bandwidth, *_ = ss.stein_score(x).args
    np.testing.assert_allclose(bandwidth, np.median(distances), rtol=1e-12)


def test_stein_on_a_normal_improves_with_points_and_beats_the_kernel_density():
    """Mean distance to −x on 300 unseen points, in five dimensions: means over 4 draws."""

    @jax.jit
    @jax.vmap
    def errors(x, unseen):
        distance = lambda s: jnp.mean(jax.vmap(lambda x: jnp.linalg.norm(s(x) + x))(unseen))
        density = ss.kernel_density_score(x, ss.silverman_bandwidth(x))
        return distance(ss.stein_score(x)), distance(density)

    few_key, many_key, unseen_key = jax.random.split(jax.random.key(2), 3)
    unseen = jax.random.normal(unseen_key, (4, 300, 5))
    few, _ = errors(jax.random.normal(few_key, (4, 100, 5)), unseen)
    many, density = errors(jax.random.normal(many_key, (4, 800, 5)), unseen)
    spread = lambda values: np.std(values, ddof=1) / 2
    assert few.mean() - many.mean() > 5 * np.hypot(spread(few), spread(many))
    assert many.mean() < 0.5 * density.mean()


def test_bad_arguments_are_named():
    data = np.zeros((10, 2), np.float32)
    nan, x = np.full((10, 2), np.nan, np.float32), jnp.zeros(2)
    cases = [
        (lambda: ss.scott_bandwidth(np.arange(6).reshape(3, 2)), "`x` must be floating point"),
        (lambda: ss.silverman_bandwidth(np.ones(5)), r"`x` must be \[n, \*event\].*\[:, None\]"),
        (lambda: ss.propose_sigma(np.ones((1, 5))), r"`x` must be \[n, \*event\] with n ≥ 2"),
        (lambda: ss.cross_validated_bandwidth(data), "`x` must have a point without a duplicate"),
        (lambda: ss.kernel_density_score(nan, 0.1), "`data` must be finite"),
        (lambda: ss.kernel_density_score(data, 0.0), "`bandwidth` must be finite and above 0"),
        (lambda: ss.kernel_density_log_prob(data, -1.0), "`bandwidth` must be .*above 0"),
        (lambda: ss.kernel_density_score(data, np.ones(2)), r"`bandwidth` must have shape \(\)"),
        (lambda: ss.stein_score(data, bandwidth=0.0), "`bandwidth` must be .*above 0"),
        (lambda: ss.stein_score(data, bandwidth=1.0, ridge=0.0), "`ridge` must be .*above 0"),
        (lambda: ss.stein_score(data[:7]), r"`len\(data\)` must be .*at least 8"),
        (lambda: ss.stein_score(data, bandwidth=1.0)(data), "`x` must have shape .*jax.vmap"),
        (lambda: ss.kernel_density_score(data, 1.0)(x[:1]), "`x` must have shape .*jax.vmap"),
        (lambda: ss.kernel_density_log_prob(data, 1.0)(jnp.zeros(2, int)), "floating point"),
    ]
    for use, words in cases:
        with pytest.raises(ValueError, match=words):
            use()


def test_some_duplicates_are_no_harm(x64, rng):
    x = rng.normal(size=(50, 2))
    x[1] = x[0]
    assert np.isfinite(ss.cross_validated_bandwidth(x)) and ss.cross_validated_bandwidth(x) > 0.05
