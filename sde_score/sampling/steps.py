"""One-step methods, each a `Step` (key, score_fn, sde, x_t, t, s) -> x_s with s < t.

The deterministic ones are exact where the noise estimate is constant, in every linear SDE: they
move u = x/alpha against the noise-to-signal ratio sigma/alpha, in which the probability flow reads
du = noise d(sigma/alpha). `ancestral` is exact where the estimate of x_0 is constant.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn
from sde_score.sde import log_snr, reverse_drift

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
    2020, eq. 7), weak order 1.

    With r = exp(log_snr(t) − log_snr(s)) and x̂_0 = (x_t − sigma_t ẑ)/alpha_t,
    x_s = alpha_s x̂_0 + sigma_s (√r ẑ + √(1 − r) z).
    """
    log_r = log_snr(sde, t) - log_snr(sde, s)
    noise = _noise(score_fn, sde, x_t, t)
    x0 = (x_t - sde.sigma(t) * noise) / sde.alpha(t)
    fresh = jnp.sqrt(-jnp.expm1(log_r)) * jax.random.normal(key, x_t.shape, x_t.dtype)
    return sde.alpha(s) * x0 + sde.sigma(s) * (jnp.exp(0.5 * log_r) * noise + fresh)


def _noise(score_fn: ScoreFn, sde: SDE, x: Event, t: Scalar) -> Event:
    """E[z | x_t]."""
    return -sde.sigma(t) * _checks.call(score_fn, x, t)


def _flow_step(sde: SDE, x_t: Event, noise: Event, t: Scalar, s: Scalar) -> Event:
    """The probability flow from t to s if the noise estimate were constant."""
    ratio = sde.alpha(s) / sde.alpha(t)
    return ratio * x_t + (sde.sigma(s) - ratio * sde.sigma(t)) * noise
