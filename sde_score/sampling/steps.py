"""One-step methods, each a `Step` (key, score_fn, sde, x_t, t, s) -> x_s with s < t, for every
linear SDE.

The deterministic ones are exact where the noise estimate is constant: they move u = x/alpha
against the noise-to-signal ratio sigma/alpha, in which the probability flow reads
du = noise d(sigma/alpha). `ancestral` is exact where the estimate of x_0 is constant.

With p(x_t | x_s) = N(a x_s, v I), a = alpha_t/alpha_s and v = sigma_t² − a² sigma_s², the
published stochastic rules are

    reverse_diffusion  (2 − a) x + v s + √v z
    ancestral          (x + v s)/a + (sigma_s/sigma_t) √v z
    ancestral_beta     (x + v s)/a + √v z

VE has a = 1 and v = sigma_t² − sigma_s²; VP has a = √(1 − beta) and v = beta, where the published
beta_i = beta(t_i)/N of N steps is v up to O(1/N²), and is v where alpha² is the product of the
published 1 − beta_i.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.sde import log_snr, reverse_drift, time_of_log_snr

Event = Float[Array, "*event"]


def euler_maruyama(
    key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> Event:
    """x_t − h (f − g² s) + √h g z with h = t − s. Weak order 1; strong order 1, as the noise is
    additive.
    """
    h = t - s
    noise = jax.random.normal(key, x_t.shape, x_t.dtype)
    return x_t - h * reverse_drift(score_fn, sde, x_t, t) + jnp.sqrt(h) * sde.diffusion(t) * noise


def reverse_diffusion(
    key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> Event:
    """(2 − a) x + v s + √v z: the reverse SDE discretised like the forward one (Song et al. 2021,
    arXiv 2011.13456, eq. 46), weak order 1.

    Forwards x_t = x_s + f + √v z with f = (a − 1) x_s exactly; backwards x_s = x_t − f + v s + √v
    z, with f at x_t. For sub-VP the published code takes `euler_maruyama` instead.
    """
    a, v = transition(sde, t, s)
    noise = jax.random.normal(key, x_t.shape, x_t.dtype)
    return (2.0 - a) * x_t + v * _checks.call(score_fn, x_t, t) + jnp.sqrt(v) * noise


def ddim(key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar) -> Event:
    """alpha_s x̂_0 + sigma_s ẑ (Song et al. 2021, arXiv 2010.02502, eq. 12 with no noise): order
    1, deterministic.
    """
    return _flow_step(sde, x_t, _noise(score_fn, sde, x_t, t), t, s)


def heun(key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar) -> Event:
    """A `ddim` step, then one with the mean of both ends' noise (Karras et al. 2022, alg. 1):
    order 2, two evaluations. With `finish=denoise`, karras_grid(sde, 17) costs EDM's 35.
    """
    noise = _noise(score_fn, sde, x_t, t)
    guess = _flow_step(sde, x_t, noise, t, s)
    return _flow_step(sde, x_t, 0.5 * (noise + _noise(score_fn, sde, guess, s)), t, s)


def ancestral(key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar) -> Event:
    """A draw of p(x_s | x_t, x_0 = E[x_0 | x_t]): DDPM with the posterior variance (Ho et al.
    2020, eq. 7), weak order 1; `ddim_eta` with eta = 1.
    """
    return _ddim_eta(1.0, key, score_fn, sde, x_t, t, s)


def ancestral_beta(
    key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> Event:
    """(x + v s)/a + √v z: `ancestral`'s mean with the larger variance of p(x_t | x_s), DDPM's
    sigma² = beta (Ho et al. 2020, sec. 3.2; Song et al. 2021, eq. 4), weak order 1.
    """
    a, v = transition(sde, t, s)
    noise = jax.random.normal(key, x_t.shape, x_t.dtype)
    return (x_t + v * _checks.call(score_fn, x_t, t)) / a + jnp.sqrt(v) * noise


def ddim_eta(eta: Scalar) -> Partial:
    """The `Step` alpha_s x̂_0 + √(sigma_s² − τ²) ẑ + τ z (Song et al. 2021, arXiv 2010.02502, eq.
    12 and 16), weak order 1.

    τ = eta (sigma_s/sigma_t) √v with eta in [0, 1]: 0 is `ddim`, 1 `ancestral`.
    """
    _checks.check_positive_number("eta", eta, zero=True)
    if _checks.is_concrete(eta) and eta > 1.0:
        raise _checks.ArgumentError(
            f"`eta` must lie in [0, 1]; got {_checks.describe(eta)}. 0 is ddim, 1 is ancestral."
        )
    return bind(_ddim_eta, eta)


def edm_stochastic(
    gamma: Scalar, *, s_min: Scalar = 0.0, s_max: Scalar = jnp.inf, s_noise: Scalar = 1.0
) -> Partial:
    """The `Step` that adds noise until sigma/alpha is 1 + gamma times as large, then takes a
    `heun` step down to s (Karras et al. 2022, arXiv 2206.00364, alg. 2): two evaluations.

    EDM's gamma is min(S_churn/N, √2 − 1) for N steps, its last to 0 (our `finish=denoise`) among
    them. Noise is added where sigma/alpha is in [s_min, s_max], with `s_noise` times its exact
    deviation, and up to the level of t1 only, as no score is known above: a step from t1 adds
    none. gamma = 0 is `heun`. With gamma ∝ 1/N and s_noise = 1 it is of weak order 2; a fixed
    gamma leaves a bias of O(gamma²), however many the steps.
    """
    numbers = ("gamma", gamma, True), ("s_min", s_min, True), ("s_noise", s_noise, False)
    for name, value, zero in numbers:
        _checks.check_positive_number(name, value, zero=zero)
    if _checks.is_concrete(s_min, s_max) and not s_min <= s_max:
        raise _checks.ArgumentError(
            f"`s_max` must be at least s_min = {s_min}; got {s_max}. Noise is added between."
        )
    return bind(_edm_stochastic, (gamma, s_min, s_max, s_noise))


def _ddim_eta(
    eta: Scalar, key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> Event:
    gap = log_snr(sde, t) - log_snr(sde, s)
    fresh = eta * jnp.sqrt(-jnp.expm1(gap))  # τ/sigma_s
    kept = jnp.sqrt(1.0 - eta**2 + eta**2 * jnp.exp(gap))  # √(1 − fresh²), not cancelled
    noise = _noise(score_fn, sde, x_t, t)
    x0 = (x_t - sde.sigma(t) * noise) / sde.alpha(t)
    z = jax.random.normal(key, x_t.shape, x_t.dtype)
    return sde.alpha(s) * x0 + sde.sigma(s) * (kept * noise + fresh * z)


def _edm_stochastic(
    options: tuple, key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> Event:
    gamma, s_min, s_max, s_noise = options
    level = log_snr(sde, t)
    ratio = jnp.exp(-0.5 * level)
    churns = (gamma > 0) & (s_min <= ratio) & (ratio <= s_max)
    raised = time_of_log_snr(sde, level - 2.0 * jnp.log1p(gamma))  # at most t1
    start = jnp.where(churns, raised, t)
    a, v = transition(sde, start, t)
    adds = v > 0  # a raise below rounding may have v < 0; and √v has no gradient at 0
    scale = s_noise * jnp.where(adds, jnp.sqrt(jnp.where(adds, v, 1.0)), 0.0)
    x = a * x_t + scale * jax.random.normal(key, x_t.shape, x_t.dtype)
    return heun(key, score_fn, sde, x, start, s)


def transition(sde: SDE, t: Scalar, s: Scalar) -> tuple[Scalar, Scalar]:
    """a and v of p(x_t | x_s) = N(a x_s, v I)."""
    v = -(sde.sigma(t) ** 2) * jnp.expm1(log_snr(sde, t) - log_snr(sde, s))
    return sde.alpha(t) / sde.alpha(s), v


def _noise(score_fn: ScoreFn, sde: SDE, x: Event, t: Scalar) -> Event:
    """E[z | x_t]."""
    return -sde.sigma(t) * _checks.call(score_fn, x, t)


def _flow_step(sde: SDE, x_t: Event, noise: Event, t: Scalar, s: Scalar) -> Event:
    """The probability flow from t to s if the noise estimate were constant."""
    ratio = sde.alpha(s) / sde.alpha(t)
    return ratio * x_t + (sde.sigma(s) - ratio * sde.sigma(t)) * noise
