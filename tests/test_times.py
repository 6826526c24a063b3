"""The laws of a loss's times and its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from test_sde import sdes, within

from sde_score import (
    VE,
    VP,
    GaussianMixture,
    antithetic_times,
    denoise,
    dsm_loss,
    exact_score,
    grid_times,
    likelihood_times,
    likelihood_weight,
    log_snr,
    lognormal_times,
    min_snr_weight,
    noise_weight,
    perturb,
    stratified_times,
    uniform_times,
)

WIDE = lognormal_times(mean=0.0, std=3.0)  # EDM's own law hardly reaches the ends of VP's range
TIMES = (uniform_times, stratified_times, antithetic_times, likelihood_times, WIDE)


@sdes
def test_laws_of_time(sde, x64):
    """Stratified times have one in each nth of [t0, t1], likelihood times in each nth of the
    log-SNR, log-normal ones in each nth of their law; all cover their ranges.
    """
    n, length = 50, sde.t1 - sde.t0
    t, weight = stratified_times(jax.random.key(4), sde, n)
    strata = np.floor((t - sde.t0) / length * n)
    np.testing.assert_array_equal(np.sort(strata), np.arange(n))
    np.testing.assert_array_equal(weight, 1.0)
    t, weight = likelihood_times(jax.random.key(5), sde, n)
    highest, lowest = log_snr(sde, sde.t0), log_snr(sde, sde.t1)
    position = (log_snr(sde, t) - lowest) / (highest - lowest)
    np.testing.assert_array_equal(np.sort(np.floor(position * n)), np.arange(n))
    # weight = 1/((t1 − t0) density), with density −d log_snr/dt over its range
    density = -jax.vmap(jax.grad(lambda t: log_snr(sde, t)))(t) / (highest - lowest)
    np.testing.assert_allclose(weight * length * density, 1.0, rtol=1e-10)
    t, weight = uniform_times(jax.random.key(6), sde, 20_000)
    within((t - sde.t0) / length, 0.5)
    within(((t - sde.t0) / length - 0.5) ** 2, 1.0 / 12.0)
    assert sde.t0 <= np.min(t) and np.max(t) <= sde.t1 and np.all(weight == 1.0)


@pytest.mark.parametrize("times", [stratified_times, antithetic_times])
def test_each_place_of_a_batch_sees_all_times(times, x64):
    """Else a batch in a fixed order would learn each example at one time alone."""
    draw = jax.jit(jax.vmap(lambda key: times(key, VP(t0=0.1), 4)[0]))
    t = (np.asarray(draw(jax.random.split(jax.random.key(0), 8_000))) - 0.1) / 0.9
    within(t, 0.5)
    within((t - 0.5) ** 2, 1.0 / 12.0)


def test_antithetic_times_come_in_pairs():
    sde = VP(t0=0.1)
    for num in (1, 6, 7):
        t, weight = antithetic_times(jax.random.key(0), sde, num)
        pairs = num // 2
        np.testing.assert_allclose(t[:pairs] + t[-pairs or num :], 1.1, rtol=1e-6)
        assert t.shape == weight.shape == (num,) and np.all(weight == 1.0)


def test_lognormal_times_are_log_normal(x64):
    """Over EDM's range, 0.002 to 80, hardly anything is cut off; on a range of one standard
    deviation the law is cut, not piled up at the ends.
    """
    t, _ = lognormal_times()(jax.random.key(0), VE(0.002, 80.0), 20_000)
    level = np.asarray(-0.5 * log_snr(VE(0.002, 80.0), t))
    np.testing.assert_allclose([level.mean(), level.std()], [-1.2, 1.2], rtol=2e-3)
    narrow = VE(np.exp(-1.2), np.exp(0.0), t0=0.0)
    t, _ = lognormal_times()(jax.random.key(1), narrow, 20_000)
    level = np.asarray(-0.5 * log_snr(narrow, t))
    # mean of a normal cut to [0, 1] standard deviations: (φ(0) − φ(1))/(Φ(1) − Φ(0))
    np.testing.assert_allclose(level.mean(), -1.2 + 1.2 * 0.15697155 / 0.34134475, rtol=1e-3)
    assert len(np.unique(level)) == 20_000


@pytest.mark.slow
def test_lognormal_times_reach_the_far_tail_in_float32():
    """Where the law's upper end lies 7 deviations above the mean, a probability that float32
    cannot tell from 1.
    """
    sde = VE(0.01, 1348.0)
    t, weight = lognormal_times()(jax.random.key(0), sde, 100_000)
    level = np.asarray(-0.5 * log_snr(sde, t))
    assert np.isfinite(weight).all()
    # the highest of 100,000 strata begins at the deviation Φ⁻¹(1 − 1e-5) = 4.26
    assert level.max() > -1.2 + 1.2 * 4.26
    far = VE(1.0, 3.0)
    t, _ = lognormal_times(mean=-8.0)(jax.random.key(1), far, 1_000)
    # the mean of N(−8, 1.2²) cut to [0, ln 3]
    np.testing.assert_allclose(np.mean(-0.5 * log_snr(far, t)), 0.171282, rtol=0.01)


@sdes
def test_times_share_one_expectation(sde, x64):
    """weight · h(t) has the mean of h over [t0, t1] under every law: (t1⁴ − t0⁴)/(4 (t1 − t0))
    for h = t³.
    """

    @jax.jit
    @jax.vmap
    def draw(key):
        draws = [
            times(key, sde, 32)
            for key, times in zip(jax.random.split(key, len(TIMES)), TIMES, strict=True)
        ]
        return jnp.stack([jnp.mean(weight * t**3) for t, weight in draws])

    means = np.asarray(draw(jax.random.split(jax.random.key(7), 600)))
    within(means, (sde.t1**4 - sde.t0**4) / (4.0 * (sde.t1 - sde.t0)))
    spread = means.std(0)
    assert spread[1] < 0.1 * spread[0]  # what strata are for
    assert spread[2] < 0.7 * spread[0]  # and mirrored pairs


def test_the_loss_has_one_expectation_under_every_law_of_time():
    x0 = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    score = lambda x, t: jnp.tanh(x[::-1] + t) - x  # noqa: E731

    @jax.jit
    @jax.vmap
    def draw(key):
        return jnp.stack(
            [
                dsm_loss(key, score, VP(), x0, times=times)
                for key, times in zip(jax.random.split(key, len(TIMES)), TIMES, strict=True)
            ]
        )

    values = np.asarray(draw(jax.random.split(jax.random.key(15), 2_000)), np.float64)
    for other in values.T[1:]:
        within(other - values[:, 0], 0.0)


def test_importance_sampled_times_halve_the_variance_of_the_likelihood_weighted_loss(x64):
    """On the oracle, VP from t0 = 1e-5: far less than half the variance, for single examples,
    where strata play no part, and for batches; and the same expectation, over a million examples,
    as with uniform times the rare t near t0 carry much of it.
    """
    sde, gmm = VP(t0=1e-5), GaussianMixture(*mixture(np.float64))
    score = exact_score(gmm, sde)

    def losses(batch, num):
        def one(key):
            data_key, *keys = jax.random.split(key, 3)
            x0 = jax.vmap(gmm.sample)(jax.random.split(data_key, batch))
            pair = zip(keys, (uniform_times, likelihood_times), strict=True)
            return jnp.stack(
                [
                    dsm_loss(key, score, sde, x0, weight=likelihood_weight, times=times)
                    for key, times in pair
                ]
            )

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num)))

    for batch, num in ((1, 20_000), (32, 2_000)):
        uniform, sampled = losses(batch, num).T
        print(f"batches of {batch}: {sampled.var() / uniform.var():.4f} of the variance")
        assert sampled.var() < 0.25 * uniform.var()
    uniform, sampled = losses(2_000, 500).T
    within(uniform - sampled, 0.0)


@sdes
def test_weights(sde, x64):
    np.testing.assert_allclose(noise_weight(sde, 0.3), sde.sigma(0.3) ** 2, rtol=1e-15)
    np.testing.assert_allclose(likelihood_weight(sde, 0.3), sde.diffusion(0.3) ** 2, rtol=1e-15)


@sdes
def test_min_snr_weighs_the_error_of_the_clean_example(sde, x64):
    """weight · ½‖s − target‖² = ½ min(SNR, gamma) ‖x̂_0 − x_0‖² at high and low SNR."""
    x0, score = jnp.asarray([0.4, -0.2]), lambda x, t: jnp.tanh(x) - x
    ratios = []
    for t in (0.01, 0.1, 0.5, 0.9):
        x_t, noise = perturb(jax.random.key(0), sde, x0, t)
        error = jnp.sum((denoise(score, sde, x_t, t) - x0) ** 2)
        residual = jnp.sum((score(x_t, t) + noise / sde.sigma(t)) ** 2)
        snr = jnp.exp(log_snr(sde, t))
        weight = min_snr_weight(2.0)(sde, t)
        np.testing.assert_allclose(weight * residual, jnp.minimum(snr, 2.0) * error, rtol=1e-10)
        ratios.append(snr > 2.0)
    assert any(ratios) and not all(ratios)


def test_grid_times_give_the_loss_of_ncsn(x64):
    """Levels in geometric progression, each as likely; for x_0 ~ N(0, I) and s = −c x the loss is
    the mean over levels of ½ d (c² sigma² + (1 − c sigma²)²) (Song & Ermon 2019, eq. 5 and 6).
    """
    sde, c = VE(sigma_min=0.1, sigma_max=2.0, t0=0.0), 0.7
    times = grid_times(jnp.linspace(0.0, 1.0, 6))
    levels = np.geomspace(0.1, 2.0, 6)
    drawn = np.asarray(sde.sigma(times(jax.random.key(0), sde, 6_000)[0]))
    count = np.isclose(drawn[:, None], levels, rtol=1e-12)
    within(count, 1.0 / 6.0)

    @jax.jit
    @jax.vmap
    def loss(key):
        data_key, loss_key = jax.random.split(key)
        x0 = jax.random.normal(data_key, (16, 2))
        return dsm_loss(loss_key, lambda x, t: -c * x, sde, x0, times=times)

    want = np.mean(c**2 * levels**2 + (1.0 - c * levels**2) ** 2)
    within(loss(jax.random.split(jax.random.key(1), 2_000)), want)


BAD = {
    "no draws": (lambda: uniform_times(jax.random.key(0), VP(), 0), "`num`.*got 0"),
    "raw key": (lambda: likelihood_times(jax.random.PRNGKey(0), VP(), 4), "`key` must be a typed"),
    "raw key to a pair": (
        lambda: antithetic_times(jax.random.PRNGKey(0), VP(), 4),
        "`key` must be a typed",
    ),
    "levels": (lambda: grid_times(jnp.ones((2, 2))), r"`ts` must be a one-dim.*shape \(2, 2\)"),
    "late level": (
        lambda: grid_times(jnp.array([0.5, 2.0]))(jax.random.key(0), VP(), 4),
        r"`ts` must lie in \[t0, t1\]",
    ),
    "std": (lambda: lognormal_times(std=0.0), "`std` must be finite and above 0; got 0.0"),
    "gamma": (lambda: min_snr_weight(-1.0), "`gamma` must be finite and above 0; got -1.0"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
