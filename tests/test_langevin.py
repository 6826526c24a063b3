"""Annealed Langevin against the papers' rules and the weights of far modes; the Metropolis
adjustment against the law that it must leave as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from test_steps import far_modes, left_mode

import sde_score as ss
from sde_score._checks import ArgumentError

COUNT = 20_000


def keys(seed, count=COUNT):
    return jax.random.split(jax.random.key(seed), count)


def test_the_levels_of_ncsn_are_a_uniform_grid_of_ve(x64):
    sde = ss.VE(sigma_min=0.01, sigma_max=1.0, t0=0.0)
    levels = sde.sigma(ss.uniform_grid(sde, 9))
    np.testing.assert_allclose(levels, np.geomspace(1.0, 0.01, 10), rtol=1e-12)


@pytest.mark.parametrize("published_code", [False, True])
def test_annealed_langevin_is_the_published_recursion(published_code, x64):
    """NCSN's algorithm 1, and the update of its code, of NCSNv2's algorithm and of its code, at
    half of the step size; then NCSNv2's final denoising.
    """
    sde = ss.VE(sigma_min=0.1, sigma_max=2.0, t0=0.0)
    ts, sigmas, epsilon = ss.uniform_grid(sde, 2), np.geomspace(2.0, 0.1, 3), 1e-3
    score = lambda x, t: -jnp.tanh(x) / (1.0 + t)  # noqa: E731
    key, init = jax.random.key(8), jnp.array([0.8, -0.3])
    _, noise_key = jax.random.split(jax.random.clone(key))
    x = np.asarray(init)
    for level, (t, sigma) in enumerate(zip(ts, sigmas, strict=True)):
        level_key = jax.random.fold_in(noise_key, level)
        for step in range(4):
            z = np.asarray(jax.random.normal(jax.random.fold_in(level_key, step), (2,)))
            s = np.asarray(score(x, t))
            if published_code:
                size = 0.5 * epsilon * (sigma / sigmas[-1]) ** 2
                x = x + size * s + z * np.sqrt(2 * size)
            else:
                alpha = epsilon * sigma**2 / sigmas[-1] ** 2
                x = x + 0.5 * alpha * s + np.sqrt(alpha) * z
    options = {"ts": ts, "step_size": epsilon, "num_steps": 4, "init": init}
    run = lambda **more: ss.annealed_langevin_sample(  # noqa: E731
        jax.random.clone(key), score, sde, (2,), **options, **more
    )
    np.testing.assert_allclose(run(finish=None), x, rtol=1e-12)
    denoised = x + sigmas[-1] ** 2 * np.asarray(score(x, ts[-1]))
    np.testing.assert_allclose(run(), denoised, rtol=1e-12)


def test_annealed_langevin_finds_the_weights_of_far_modes_and_plain_langevin_does_not():
    """As sigma falls the weights freeze where the modes still overlap a little: measured with
    60,000 draws, this costs 1.5 ± 0.6 of these standard errors.
    """
    gmm = far_modes()
    sde = ss.VE(sigma_min=0.3, sigma_max=6.0, t0=0.0)
    score, step = ss.exact_score(gmm, sde), 0.3 * 0.3**2

    @jax.jit
    @jax.vmap
    def annealed(key):
        options = {"ts": ss.uniform_grid(sde, 15), "step_size": step, "num_steps": 100}
        return ss.annealed_langevin_sample(key, score, sde, (2,), **options)

    @jax.jit
    @jax.vmap
    def plain(key):
        start_key, key = jax.random.split(key)
        start = ss.sample_prior(start_key, sde, (2,))
        return ss.langevin_sample(key, gmm.score, start, step_size=step, num_steps=500)

    fraction, deviation = left_mode(annealed(keys(1)))
    stuck, far = left_mode(plain(keys(2)))
    print(
        f"annealed {fraction:.4f} ({deviation:.2f} standard errors), plain {stuck:.4f} ({far:.0f})"
    )
    assert abs(deviation) < 5
    assert far < -40  # the prior is symmetric: half of the draws begin and stay on either side


def test_the_step_size_of_annealed_langevin_is_that_of_the_last_level():
    """Any SDE: under VP N(0, 1) stays N(0, 1), so 30 moves settle at the variance 1/(1 − ε/4)."""
    sde, epsilon = ss.VP(), 0.8

    @jax.jit
    @jax.vmap
    def draw(key):
        options = {"ts": jnp.array([0.5, 0.4]), "init": jnp.zeros(1), "finish": None}
        return ss.annealed_langevin_sample(
            key, lambda x, t: -x, sde, (1,), step_size=epsilon, num_steps=30, **options
        )

    variance = np.asarray(draw(keys(3)), np.float64).var()
    assert abs(variance * (1 - epsilon / 4) - 1) < 5 * np.sqrt(2 / COUNT)


def test_one_move_of_mala_on_a_normal(x64):
    """For N(0, 1) the log acceptance is −(ε/8)(y² − x²), whatever side the move goes to."""
    epsilon, count = 3.0, 200
    log_prob = lambda x: -0.5 * jnp.sum(x**2)  # noqa: E731
    x = jnp.linspace(-3.0, 3.0, count)[:, None]
    options = {"step_size": epsilon, "num_steps": 1}
    move = jax.jit(jax.vmap(lambda key, x: ss.mala_sample(key, log_prob, x, **options)))
    after, acceptance = move(keys(4, count), x)

    @jax.jit
    @jax.vmap
    def draws(key):
        noise_key, accept_key = jax.random.split(jax.random.fold_in(key, 0))
        return jax.random.normal(noise_key, (1,)), jax.random.uniform(accept_key)

    z, u = draws(keys(4, count))
    y = x - 0.5 * epsilon * x + np.sqrt(epsilon) * z
    accept = np.log(u) < -epsilon / 8 * (y**2 - x**2)[:, 0]
    assert 20 < accept.sum() < 180
    np.testing.assert_array_equal(acceptance, accept)
    np.testing.assert_allclose(after, np.where(accept[:, None], y, x), rtol=1e-12)


def test_stationary_variances_of_langevin_and_mala_at_a_large_step():
    """At ε = 1.5, N(0, 1): unadjusted 1/(1 − ε/4) = 1.6, adjusted 1. An unadjusted move leaves a
    quarter of its start, an adjusted one is made in 0.86 of the cases: 30 suffice.
    """
    epsilon = 1.5
    options = {"step_size": epsilon, "num_steps": 30}

    @jax.jit
    @jax.vmap
    def both(key):
        start_key, plain_key, mala_key = jax.random.split(key, 3)
        x = 2.0 * jax.random.normal(start_key, (1,))
        plain = ss.langevin_sample(plain_key, lambda x: -x, x, **options)
        return plain, ss.mala_sample(mala_key, lambda x: -0.5 * jnp.sum(x**2), x, **options)

    plain, adjusted = both(keys(5))
    stderr = np.sqrt(2 / COUNT)  # of a variance, relative
    ratios = [np.asarray(x, np.float64).var() for x in (plain, adjusted.x)]
    print(f"variances {ratios[0]:.4f} of 1.6, {ratios[1]:.4f} of 1; standard error {stderr:.4f}")
    assert abs(ratios[0] / 1.6 - 1) < 5 * stderr
    assert abs(ratios[1] - 1) < 5 * stderr


def test_mala_leaves_a_mixture_invariant_where_langevin_does_not():
    """Started in the law itself; 20 large moves. Means and second moments are known."""
    gmm = ss.GaussianMixture(*mixture())
    options = {"step_size": 0.15, "num_steps": 20}

    @jax.jit
    @jax.vmap
    def both(key):
        start_key, plain_key, mala_key = jax.random.split(key, 3)
        x = gmm.sample(start_key)
        plain = ss.langevin_sample(plain_key, gmm.score, x, **options)
        return plain, ss.mala_sample(mala_key, gmm.log_prob, x, **options)

    def deviations(x):
        x = np.asarray(x, np.float64)
        values = np.concatenate([x, x**2, x[:, :1] * x[:, 1:]], axis=1)
        second = np.asarray(gmm.covariance + jnp.outer(gmm.mean, gmm.mean))
        exact = np.array([*gmm.mean, second[0, 0], second[1, 1], second[0, 1]])
        return (values.mean(0) - exact) / (values.std(0) / np.sqrt(COUNT))

    plain, adjusted = both(keys(7))
    acceptance = adjusted.acceptance.mean()
    print(
        f"MALA {deviations(adjusted.x).round(1)}, Langevin {deviations(plain).round(1)}, "
        f"acceptance {acceptance:.3f}"
    )
    assert 0.5 < acceptance < 0.95
    assert np.abs(deviations(adjusted.x)).max() < 5
    assert np.abs(deviations(plain)).max() > 10


def test_mala_stays_inside_the_support():
    """The exponential law: outside, where the log-density is −∞, every move is refused. Its mean
    is 1, its second moment 2.
    """

    def log_prob(x):
        return jnp.sum(jnp.where(x > 0, -x, -jnp.inf))

    @jax.jit
    @jax.vmap
    def draw(key):
        start_key, key = jax.random.split(key)
        start = jax.random.exponential(start_key, (1,))
        return ss.mala_sample(key, log_prob, start, step_size=1.0, num_steps=20)

    x, acceptance = (np.asarray(value, np.float64) for value in draw(keys(8)))
    assert (x > 0).all() and 0.2 < acceptance.mean() < 0.9
    assert abs(x.mean() - 1) < 5 / np.sqrt(COUNT)
    assert abs((x**2).mean() - 2) < 5 * np.sqrt(20 / COUNT)  # E x⁴ − 4 = 20


def test_bad_arguments_of_annealed_langevin_and_mala():
    sde, x = ss.VE(t0=0.0), jnp.zeros(2)
    score, log_prob = lambda x, t: -x, lambda x: -0.5 * jnp.sum(x**2)
    good = {"step_size": 0.1, "num_steps": 1}
    for bad, words in (
        ({"step_size": 0.0}, "`step_size` must be finite and above 0"),
        ({"num_steps": 0}, "`num_steps` .* at least 1; got 0"),
    ):
        options = good | bad
        with pytest.raises(ArgumentError, match=words):
            ts = ss.uniform_grid(sde, 2)
            ss.annealed_langevin_sample(jax.random.key(0), score, sde, (2,), ts=ts, **options)
        with pytest.raises(ArgumentError, match=words):
            ss.mala_sample(jax.random.key(0), log_prob, x, **options)
    ts = jnp.array([0.5, 1.0])
    with pytest.raises(ArgumentError, match="`ts` must decrease"):
        ss.annealed_langevin_sample(jax.random.key(0), score, sde, (2,), ts=ts, **good)
    with pytest.raises(ArgumentError, match="`log_prob` must return a scalar; got shape .2,"):
        ss.mala_sample(jax.random.key(0), lambda x: -(x**2), x, **good)
