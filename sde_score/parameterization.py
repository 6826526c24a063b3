"""What a network predicts, as functions to functions: score, noise, denoiser, velocity and EDM's
preconditioning.

With x_t = alpha x_0 + sigma z, all say the same (Song et al. 2021; Salimans & Ho 2022; Karras et
al. 2022):

    score = −noise/sigma = (alpha·denoiser − x_t)/sigma²
          = −(sigma x_t + alpha·velocity)/(sigma (alpha² + sigma²))

where noise = E[z | x_t], denoiser = E[x_0 | x_t], velocity = alpha·noise − sigma·denoiser. Each
conversion returns a pytree that travels through `jit`, so new parameters never recompile.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Scalar, ScoreFn, bind
from sde_score.sde import log_snr

Event = Float[Array, "*event"]


def score_from_noise(sde: SDE, noise_fn: Callable) -> Partial:
    """s = −noise_fn(x, t)/sigma(t)."""
    return bind(_score_from_noise, sde, noise_fn)


def score_from_denoiser(sde: SDE, denoiser: Callable) -> Partial:
    """s = (alpha·denoiser(x, t) − x)/sigma² (Tweedie's formula).

    In float32 the difference loses digits as sigma → 0; `score_from_preconditioned` does not.
    """
    return bind(_score_from_denoiser, sde, denoiser)


def score_from_velocity(sde: SDE, velocity_fn: Callable) -> Partial:
    """s = −(sigma x + alpha·velocity_fn(x, t))/(sigma (alpha² + sigma²)), for every linear SDE."""
    return bind(_score_from_velocity, sde, velocity_fn)


def score_from_preconditioned(sde: SDE, net_fn: Callable, *, sigma_data: Scalar) -> Partial:
    """The score of `precondition`'s denoiser without its cancellation: s = −c_in² x + (alpha
    sigma_data c_in/sigma) F.
    """
    _checks.check_positive("sigma_data", sigma_data)
    return bind(_score_from_preconditioned, sde, net_fn, sigma_data)


def noise_from_score(sde: SDE, score_fn: ScoreFn) -> Partial:
    """E[z | x_t] = −sigma(t)·score_fn(x, t)."""
    return bind(_noise_from_score, sde, score_fn)


def denoiser_from_score(sde: SDE, score_fn: ScoreFn) -> Partial:
    """E[x_0 | x_t] as a function of (x, t): `denoise` with its first two arguments bound."""
    return bind(denoise, score_fn, sde)


def velocity_from_score(sde: SDE, score_fn: ScoreFn) -> Partial:
    """alpha E[z | x_t] − sigma E[x_0 | x_t] = −(sigma x + sigma (alpha² + sigma²) s)/alpha."""
    return bind(_velocity_from_score, sde, score_fn)


def denoise(score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, *context: Array) -> Event:
    """E[x_0 | x_t] = (x_t + sigma² s(x_t, t))/alpha (Tweedie's formula; Efron 2011, sec. 2)."""
    _checks.check_floating("x_t", x_t)
    _checks.check_scalar_time(t, sde)
    return (x_t + sde.sigma(t) ** 2 * _checks.call(score_fn, x_t, t, *context)) / sde.alpha(t)


def precondition(sde: SDE, net_fn: Callable, *, sigma_data: Scalar) -> Partial:
    """The denoiser D(x, t) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, eq. 7), for
    every linear SDE.

    With sd = sigma_data, the data's standard deviation: c_in = (alpha² sd² + sigma²)^{−½}, c_skip
    = alpha sd² c_in², c_out = sigma sd c_in, c_noise = ¼ ln(sigma/alpha). At alpha = 1 these are
    EDM's (table 1).
    """
    _checks.check_positive("sigma_data", sigma_data)
    return bind(_preconditioned, sde, net_fn, sigma_data)


def static_threshold(denoiser: Callable, *, bound: Scalar = 1.0) -> Partial:
    """The denoiser with its x̂_0 clipped to [−bound, bound], the range of the data (Ho et al. 2020;
    Saharia et al. 2022, arXiv 2205.11487, sec. 2.3).

    In a sampler: score_from_denoiser(sde, static_threshold(denoiser_from_score(sde, score_fn))).
    """
    _checks.check_positive("bound", bound)
    return bind(_threshold, denoiser, bound, None)


def dynamic_threshold(
    denoiser: Callable, *, quantile: Scalar = 0.995, bound: Scalar = 1.0
) -> Partial:
    """The denoiser with its x̂_0 clipped to [−q, q] and scaled by bound/q, where q is the quantile
    of |x̂_0| over the example's coordinates, or `bound` if that is larger (Saharia et al. 2022,
    arXiv 2205.11487, sec. 2.3).
    """
    _checks.check_positive("bound", bound)
    _checks.check_positive("quantile", quantile)
    if _checks.is_concrete(quantile) and quantile > 1:
        raise _checks.ArgumentError(f"`quantile` must lie in (0, 1]; got {quantile}.")
    return bind(_threshold, denoiser, bound, quantile)


def _threshold(
    denoiser: Callable,
    bound: Scalar,
    quantile: Scalar | None,
    x: Event,
    t: Scalar,
    *context: Array,
) -> Event:
    x0 = _checks.call(denoiser, x, t, *context, name="denoiser")
    if quantile is None:
        return jnp.clip(x0, -bound, bound)
    reach = jnp.maximum(jnp.quantile(jnp.abs(x0), quantile), bound)
    return jnp.clip(x0, -reach, reach) * (bound / reach)


def _score_from_noise(sde: SDE, noise_fn: Callable, x: Event, t: Scalar, *context: Array) -> Event:
    _checks.check_scalar_time(t, sde)
    return -_checks.call(noise_fn, x, t, *context, name="noise_fn") / sde.sigma(t)


def _score_from_denoiser(
    sde: SDE, denoiser: Callable, x: Event, t: Scalar, *context: Array
) -> Event:
    _checks.check_scalar_time(t, sde)
    x0 = _checks.call(denoiser, x, t, *context, name="denoiser")
    return (sde.alpha(t) * x0 - x) / sde.sigma(t) ** 2


def _score_from_velocity(
    sde: SDE, velocity_fn: Callable, x: Event, t: Scalar, *context: Array
) -> Event:
    _checks.check_scalar_time(t, sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    velocity = _checks.call(velocity_fn, x, t, *context, name="velocity_fn")
    return -(sigma * x + alpha * velocity) / (sigma * (alpha**2 + sigma**2))


def _score_from_preconditioned(
    sde: SDE, net_fn: Callable, sigma_data: Scalar, x: Event, t: Scalar, *context: Array
) -> Event:
    _checks.check_scalar_time(t, sde)
    c_in, c_noise = input_scaling(sde, sigma_data, t)
    net = _checks.call(net_fn, c_in * x, c_noise, *context, name="net_fn")
    return -(c_in**2) * x + sde.alpha(t) * sigma_data * c_in / sde.sigma(t) * net


def _preconditioned(
    sde: SDE, net_fn: Callable, sigma_data: Scalar, x: Event, t: Scalar, *context: Array
) -> Event:
    _checks.check_scalar_time(t, sde)
    c_in, c_noise = input_scaling(sde, sigma_data, t)
    net = _checks.call(net_fn, c_in * x, c_noise, *context, name="net_fn")
    return sde.alpha(t) * (sigma_data * c_in) ** 2 * x + sde.sigma(t) * sigma_data * c_in * net


def input_scaling(sde: SDE, sigma_data: Scalar, t: Scalar) -> tuple[Scalar, Scalar]:
    """c_in and c_noise of `precondition`."""
    c_in = (sde.alpha(t) ** 2 * sigma_data**2 + sde.sigma(t) ** 2) ** -0.5
    return c_in, -0.125 * log_snr(sde, t)


def _noise_from_score(sde: SDE, score_fn: ScoreFn, x: Event, t: Scalar, *context: Array) -> Event:
    _checks.check_scalar_time(t, sde)
    return -sde.sigma(t) * _checks.call(score_fn, x, t, *context)


def _velocity_from_score(
    sde: SDE, score_fn: ScoreFn, x: Event, t: Scalar, *context: Array
) -> Event:
    _checks.check_scalar_time(t, sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    score = _checks.call(score_fn, x, t, *context)
    return -(sigma / alpha) * (x + (alpha**2 + sigma**2) * score)
