"""Linear stochastic differential equations as data, and the functions that need nothing but one.

Every SDE here is dx = f(x, t) dt + g(t) dw with p(x_t | x_0) = N(alpha(t) x_0, sigma(t)² I)
(Song et al. 2021, arXiv 2011.13456). It is a pytree: under `jit`, another number never recompiles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, register_pytree


def _check_increasing(low_name: str, low: Any, high_name: str, high: Any) -> None:
    if _checks.is_concrete(low, high) and not low < high:
        raise _checks.ArgumentError(
            f"`{low_name}` must be below `{high_name}`; got {low_name}={low}, {high_name}={high}. "
            "Swap or change them."
        )


@dataclasses.dataclass(frozen=True)
class _LinearBeta:
    """What VP and sub-VP share: beta(t) = beta_min + t (beta_max − beta_min), drift −½ beta x,
    alpha = e^{−B/2}.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t0: float = 1e-5
    t1: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta_min", "beta_max", "t0", "t1"):
            _checks.check_positive(name, getattr(self, name))
        _check_increasing("t0", self.t0, "t1", self.t1)

    def beta(self, t: Scalar) -> Scalar:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def int_beta(self, t: Scalar) -> Scalar:
        """B(t), the integral of beta over [0, t]."""
        return t * self.beta_min + 0.5 * t**2 * (self.beta_max - self.beta_min)

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.exp(-0.5 * self.int_beta(t))

    def drift(self, x: Float[Array, "*event"], t: Scalar) -> Float[Array, "*event"]:
        return -0.5 * self.beta(t) * x


@register_pytree
@dataclasses.dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance-preserving SDE dx = −½ beta(t) x dt + √beta(t) dw with linear beta (Song et al.
    2021, eq. 11).

    `t` runs from `t0` to `t1` (dimensionless); `x` in data units, about unit variance expected.
    The default t0 serves training and likelihood; published samplers start from t0 = 1e-3.
    """

    def sigma(self, t: Scalar) -> Scalar:
        return jnp.sqrt(-jnp.expm1(-self.int_beta(t)))  # 1 - alpha² cancels near t = 0 in float32

    def diffusion(self, t: Scalar) -> Scalar:
        return jnp.sqrt(self.beta(t))


@register_pytree
@dataclasses.dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-VP SDE dx = −½ beta x dt + √(beta (1 − e^{−2B})) dw, sigma = 1 − e^{−B} (Song et al.
    2021, eq. 12 and 29).

    `t0` defaults to 1e-3: at 1e-5 sigma is 1e-6, which float32 data of size 1 cannot resolve.
    """

    t0: float = 1e-3

    def sigma(self, t: Scalar) -> Scalar:
        return -jnp.expm1(-self.int_beta(t))

    def diffusion(self, t: Scalar) -> Scalar:
        decay = jnp.exp(-self.int_beta(t))  # 1 − e^{−2B} = (1 − e^{−B}) (1 + e^{−B})
        return jnp.sqrt(self.beta(t) * self.sigma(t) * (1.0 + decay))


@register_pytree
@dataclasses.dataclass(frozen=True)
class VE:
    """Variance-exploding SDE dx = √(d sigma²/dt) dw, sigma = sigma_min (sigma_max/sigma_min)^t
    (Song et al. 2021, eq. 9).

    p(x_t | x_0) has standard deviation sigma(t), so t = 0 already carries sigma_min. Defaults:
    CIFAR-10 in [0, 1].
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t0: float = 1e-5
    t1: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "t1"):
            _checks.check_positive(name, getattr(self, name))
        _checks.check_positive("t0", self.t0, zero=True)
        _check_increasing("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)
        _check_increasing("t0", self.t0, "t1", self.t1)

    @property
    def log_ratio(self) -> Scalar:
        """ln(sigma_max / sigma_min)."""
        return jnp.log(self.sigma_max) - jnp.log(self.sigma_min)

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.ones_like(t)

    def sigma(self, t: Scalar) -> Scalar:
        return self.sigma_min * jnp.exp(t * self.log_ratio)

    def drift(self, x: Float[Array, "*event"], t: Scalar) -> Float[Array, "*event"]:
        return jnp.zeros_like(x)

    def diffusion(self, t: Scalar) -> Scalar:
        return self.sigma(t) * jnp.sqrt(2.0 * self.log_ratio)


def perturb(key: Key, sde: SDE, x0: Float[Array, "*event"], t: Scalar) -> tuple[Array, Array]:
    """A draw x_t = alpha(t) x_0 + sigma(t) z of p(x_t | x_0), and its noise z ~ N(0, I)."""
    _checks.check_key(key)
    _checks.check_floating("x0", x0)
    _checks.check_scalar_time(t, sde)
    noise = jax.random.normal(key, jnp.shape(x0), jnp.result_type(x0))
    return sde.alpha(t) * x0 + sde.sigma(t) * noise, noise


def log_snr(sde: SDE, t: Scalar) -> Scalar:
    """The logarithm of the signal-to-noise ratio, ln(alpha²/sigma²); its time derivative is
    −g²/sigma².
    """
    _checks.check_time("t", t, sde)
    return 2.0 * (jnp.log(sde.alpha(t)) - jnp.log(sde.sigma(t)))


def time_of_log_snr(sde: SDE, value: Scalar) -> Scalar:
    """The time t in [t0, t1] with log_snr(t) = value, for any SDE, as log-SNR decreases in t.

    Bisection, then one Newton step with dlog_snr/dt = −g²/sigma², which carries the gradient.
    """
    value = jnp.asarray(value, jnp.result_type(float, value))
    fixed, target = jax.lax.stop_gradient((sde, value))

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        later = log_snr(fixed, middle) > target
        return jnp.where(later, middle, low), jnp.where(later, high, middle)

    ends = tuple(jnp.full_like(target, end) for end in (fixed.t0, fixed.t1))
    # 2^-70 lies past float64's resolution at t = 1e-5.
    t = 0.5 * sum(jax.lax.fori_loop(0, 70, halve, ends))
    slope = (fixed.diffusion(t) / fixed.sigma(t)) ** 2
    return jnp.clip(t + (log_snr(sde, t) - value) / slope, sde.t0, sde.t1)


def sample_prior(key: Key, sde: SDE, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """A draw of the prior N(0, sigma(t1)² I)."""
    _checks.check_key(key)
    _checks.check_event_shape(shape)
    return sde.sigma(jnp.asarray(sde.t1)) * jax.random.normal(key, shape)


def prior_log_prob(sde: SDE, x: Float[Array, "*event"]) -> Scalar:
    """log N(x; 0, sigma(t1)² I), in nats."""
    _checks.check_floating("x", x)
    sigma = sde.sigma(jnp.asarray(sde.t1))
    return -0.5 * jnp.sum((x / sigma) ** 2) - x.size * (
        jnp.log(sigma) + 0.5 * jnp.log(2.0 * jnp.pi)
    )


def reverse_drift(
    score_fn: ScoreFn, sde: SDE, x: Float[Array, "*event"], t: Scalar, *, churn: Scalar = 1.0
) -> Float[Array, "*event"]:
    """f − ½ (1 + churn²) g² s: the drift (in dt) of a process with diffusion churn·g and the
    marginals p_t.

    churn = 1 is the reverse SDE (Anderson 1982; Song et al. 2021, eq. 6), churn = 0 the
    probability-flow ODE (eq. 13); both lie in the family of Karras et al. 2022, eq. 103.
    """
    _checks.check_scalar_time(t, sde)
    score = _checks.call(score_fn, x, t)
    return sde.drift(x, t) - 0.5 * (1.0 + churn**2) * sde.diffusion(t) ** 2 * score
