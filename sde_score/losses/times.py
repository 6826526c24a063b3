"""What a loss over an SDE averages: weights of the noise levels, and the laws of its times.

A loss is an estimate of E_t E_{x_t} [weight(t) · objective], t uniform on [t0, t1], whatever law
draws the times: each `Times` returns with its draws the weights 1/((t1 − t0) density) that keep
the expectation the same. `grid_times` alone averages over a grid instead.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, bind
from sde_score.sde import log_snr, time_of_log_snr

Weight: TypeAlias = Callable[[SDE, Scalar], Scalar]
Draws: TypeAlias = tuple[Float[Array, " num"], Float[Array, " num"]]
Times: TypeAlias = Callable[[Key, SDE, int], Draws]


def noise_weight(sde: SDE, t: Scalar) -> Scalar:
    """sigma(t)²: each noise level weighs the same in units of the noise (Song et al. 2021, sec.
    3.3).
    """
    return sde.sigma(t) ** 2


def likelihood_weight(sde: SDE, t: Scalar) -> Scalar:
    """g(t)²: the loss bounds the negative log-likelihood (Song et al. 2021, arXiv 2101.09258, thm
    1).
    """
    return sde.diffusion(t) ** 2


def min_snr_weight(gamma: Scalar = 5.0) -> Partial:
    """A weight: min(SNR, gamma) on the squared error of x̂_0 (Hang et al. 2023, arXiv 2303.09556,
    sec. 3.4).

    As x̂_0 is off by sigma²/alpha times the score's error and SNR = alpha²/sigma², it is sigma²
    min(1, gamma/SNR) on a score's: the noise weight, less where hardly any noise is left.
    """
    _checks.check_positive_number("gamma", gamma)
    return bind(_min_snr_weight, gamma)


def uniform_times(key: Key, sde: SDE, num: int) -> Draws:
    """Independent times, uniform on [t0, t1]; their weights are 1."""
    _check_draw(key, num)
    return _on_range(sde, jax.random.uniform(key, (num,))), jnp.ones(num)


def stratified_times(key: Key, sde: SDE, num: int) -> Draws:
    """One time in each of `num` equal parts of [t0, t1]: uniform on the whole, with less variance
    in a batch's loss.
    """
    return _on_range(sde, _stratified(key, num)), jnp.ones(num)


def antithetic_times(key: Key, sde: SDE, num: int) -> Draws:
    """Uniform times in pairs t and t0 + t1 − t, antithetic variates (an odd `num` leaves its last
    one alone).

    Less variance where the loss is monotone in t; `stratified_times` gains at least as much where
    it is smooth.
    """
    _check_draw(key, num)
    half = jax.random.uniform(key, ((num + 1) // 2,))
    return _on_range(sde, jnp.concatenate([half, 1.0 - half])[:num]), jnp.ones(num)


def likelihood_times(key: Key, sde: SDE, num: int) -> Draws:
    """Times with density ∝ g²/sigma² (Song et al. 2021, arXiv 2101.09258, sec. 5.1), stratified.

    As g²/sigma² = −d log_snr/dt for every linear SDE, they are uniform in log-SNR.
    """
    lowest, highest = _log_snr_range(sde)
    t = time_of_log_snr(sde, lowest + (highest - lowest) * _stratified(key, num))
    return t, (highest - lowest) / (_log_snr_slope(sde, t) * (sde.t1 - sde.t0))


def lognormal_times(*, mean: Scalar = -1.2, std: Scalar = 1.2) -> Partial:
    """A law of times: ln(sigma/alpha) ~ N(mean, std²), cut to the SDE's range, stratified (Karras
    et al. 2022, table 1).
    """
    _checks.check_positive("std", std)
    return bind(_lognormal_times, mean, std)


def grid_times(ts: Float[Array, " levels"]) -> Partial:
    """A law of times: one of `ts`, each as likely; their weights are 1.

    NCSN's loss over L geometric noise levels (Song & Ermon 2019, eq. 6) is `dsm_loss` with sde =
    VE(sigma_min, sigma_max, t0=0) and grid_times(jnp.linspace(0, 1, L)).
    """
    if jnp.ndim(ts) != 1 or jnp.size(ts) == 0:
        raise _checks.ArgumentError(
            f"`ts` must be a one-dimensional array of times; got shape {jnp.shape(ts)}."
        )
    _checks.check_data("ts", ts)
    return bind(_grid_times, ts)


def _min_snr_weight(gamma: Scalar, sde: SDE, t: Scalar) -> Scalar:
    return sde.sigma(t) ** 2 * jnp.minimum(1.0, gamma * jnp.exp(-log_snr(sde, t)))


def _lognormal_times(mean: Scalar, std: Scalar, key: Key, sde: SDE, num: int) -> Draws:
    ends = jnp.stack([(-0.5 * end - mean) / std for end in _log_snr_range(sde)[::-1]])
    fraction, (below, above) = _stratified(key, num), (norm.cdf(ends), norm.sf(ends))
    lower, upper = (tail[0] + (tail[1] - tail[0]) * fraction for tail in (below, above))
    # From the nearer tail: in float32 the probability itself ends 5 deviations above the mean.
    standard = jnp.where(lower < upper, norm.ppf(lower), -norm.ppf(upper))
    t = time_of_log_snr(sde, -2.0 * (mean + std * standard))
    density = norm.pdf(standard) / (below[1] - below[0]) / std * 0.5 * _log_snr_slope(sde, t)
    return t, 1.0 / (density * (sde.t1 - sde.t0))


def _grid_times(ts: Array, key: Key, sde: SDE, num: int) -> Draws:
    _check_draw(key, num)
    _checks.check_time("ts", ts, sde)
    return jax.random.choice(key, jnp.asarray(ts), (num,)), jnp.ones(num)


def _on_range(sde: SDE, fractions: Float[Array, " num"]) -> Float[Array, " num"]:
    return sde.t0 + (sde.t1 - sde.t0) * fractions


def _log_snr_range(sde: SDE) -> tuple[Scalar, Scalar]:
    return log_snr(sde, jnp.asarray(sde.t1, float)), log_snr(sde, jnp.asarray(sde.t0, float))


def _log_snr_slope(sde: SDE, t: Float[Array, " num"]) -> Float[Array, " num"]:
    """−d log_snr/dt."""
    return (jax.vmap(sde.diffusion)(t) / jax.vmap(sde.sigma)(t)) ** 2


def _stratified(key: Key, num: int) -> Float[Array, " num"]:
    """One fraction in each nth, from a random one on: the ith alone is uniform on [0, 1], so that
    an example that stands always at the same place of a batch sees all times.
    """
    _check_draw(key, num)
    start_key, offset_key = jax.random.split(key)
    start = jax.random.randint(start_key, (), 0, num)
    return ((start + jnp.arange(num)) % num + jax.random.uniform(offset_key, (num,))) / num


def _check_draw(key: Key, num: int) -> None:
    _checks.check_key(key)
    _checks.check_count("num", num)
