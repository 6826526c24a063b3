"""Multistep methods: one evaluation a step, and the earlier ones remembered. Each integrates
exactly the polynomial through its remembered values, on any grid, under every linear SDE.

With lambda = log(alpha/sigma) and x̂_0 = E[x_0 | x_t] the probability flow is d(x/sigma) = e^lambda
x̂_0 dlambda: where x_t = alpha x_0 + sigma z with the same x_0 and z at all times, x/sigma moves by
x_0 d(e^lambda). Integrated from t to s, with h = lambda_s − lambda_t and r = lambda − lambda_t,

    x_s = (sigma_s/sigma_t) x_t + alpha_s ∫_0^h e^{r−h} x̂_0(r) dr

(Lu et al. 2022, arXiv 2211.01095, eq. 8), and the reverse SDE likewise:

    x_s = (sigma_s/sigma_t) e^{−h} x_t + 2 alpha_s ∫_0^h e^{2(r−h)} x̂_0(r) dr
          + sigma_s √(1 − e^{−2h}) z

`adams` has coordinates in which normal data of standard deviation sd do not move at all: with
rho² = alpha² sd² + sigma² and the angle phi = arctan(sigma/(alpha sd)), x/rho = cos phi (x_0/sd) +
sin phi z, so d(x/rho) = v dphi with the velocity v = E[cos phi z − sin phi x_0/sd | x_t] (Salimans
& Ho 2022, arXiv 2202.00512, app. D, for sd = 1).

So each step needs the moments m_k = ∫_0^h e^{rate(r−h)} r^k dr of one kernel. They are Gauss
quadratures: their terms are positive, so that nothing cancels for small h, in float32 either.

The polynomial of order k has the nodes 0, r_1, …, r_{k−1}, the current and the earlier clock
times less the current one. It is written in 1/r_j: a node that is not there yet lies at infinity,
1/r_j = 0, which lowers the order of the first steps by itself.

The corrector (UniC; Zhao et al. 2023, arXiv 2302.04867) costs no evaluation: once the value v at s
is known, the polynomial through that one too differs from the step's by (v − p(h)) π(r)/π(h), π(r)
= r (1 − r/r_1) (1 − r/r_2), and so its integral by (v − p(h)) ∫ π/π(h), which raises the order by
one. The last step stays uncorrected, which costs no order. The first is of order 1 and, in every
method of order 3, corrected, lest it hold the order at 2; its error, O(h³) then, holds it at 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.parameterization import denoise
from sde_score.sampling.grid import Multistep
from sde_score.sde import log_snr

Event = Float[Array, "*event"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)  # good to rounding for rate·h up to 25
_NODES, _WEIGHTS = 0.5 * (1.0 + _NODES), 0.5 * _WEIGHTS  # on [0, 1]


class History(NamedTuple):
    """What a method remembers: the last two clock times and values, the newest first; the value
    foretold for the end of the step; what x gains for each unit by which the value exceeds it.
    """

    clocks: Float[Array, " 2"]
    values: Float[Array, "2 *event"]
    foretold: Event
    gain: Scalar


class Interval(NamedTuple):
    """x_s = ratio x_t + scale ∫_0^h e^{rate(r−h)} value(r) dr with h = end − start."""

    start: Scalar
    end: Scalar
    ratio: Scalar
    scale: Scalar
    rate: float


def dpm_solver_pp(order: int = 2) -> Multistep:
    """DPM-Solver++ of order 1 (`ddim`), 2 (2M) or 3 (3M), deterministic (Lu et al. 2022, alg. 2,
    here with exact integrals).

    The line or parabola through the last values of x̂_0 is integrated exactly, whatever the grid.
    It likes about equal steps in log-SNR: a last step that is long in it spoils order 3.
    """
    return _multistep(_data, order, corrected=False)


def unipc(order: int = 2) -> Multistep:
    """`dpm_solver_pp(order)` and the corrector: of order 2, 3 and 3, with less error (UniPC; Zhao
    et al. 2023, here with exact integrals).
    """
    return _multistep(_data, order, corrected=True)


def adams(order: int = 3, *, sigma_data: Scalar = 1.0) -> Multistep:
    """Adams–Bashforth–Moulton: the velocity in the angle phi and the corrector; of order 2, 3 and
    3, with less error.

    Of the deterministic methods here the best at few evaluations. `sigma_data` is the data's
    standard deviation, roughly. phi is bounded, so that no step of a grid is too long in it.
    """
    _checks.check_positive("sigma_data", sigma_data)
    return _multistep(bind(_velocity, sigma_data), order, corrected=True)


def sde_dpm_solver_pp() -> Multistep:
    """SDE-DPM-Solver++(2M) for the reverse SDE (Lu et al. 2022), here with exact integrals: weak
    order 2.
    """
    return Multistep(bind(_no_history), bind(_sde_step))


def _multistep(family: Callable, order: int, *, corrected: bool) -> Multistep:
    _checks.check_count("order", order)
    if order > 3:
        raise _checks.ArgumentError(
            f"`order` must be 1, 2 or 3; got {order}. For more accuracy take more steps."
        )
    return Multistep(bind(_no_history), bind(_step, family, order, corrected))


def _no_history(x: Event) -> History:
    zeros = jnp.zeros((2, *x.shape), x.dtype)
    return History(jnp.full(2, jnp.inf, x.dtype), zeros, zeros[0], jnp.zeros((), x.dtype))


def _data(score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar) -> tuple[Interval, Event]:
    start, end = 0.5 * log_snr(sde, t), 0.5 * log_snr(sde, s)
    interval = Interval(start, end, sde.sigma(s) / sde.sigma(t), sde.alpha(s), 1.0)
    return interval, denoise(score_fn, sde, x_t, t)


def _noisy_data(
    score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> tuple[Interval, Event]:
    interval, x0 = _data(score_fn, sde, x_t, t, s)
    ratio = interval.ratio * jnp.exp(interval.start - interval.end)
    return interval._replace(ratio=ratio, scale=2.0 * interval.scale, rate=2.0), x0


def _velocity(
    sigma_data: Scalar, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar
) -> tuple[Interval, Event]:
    """v = −(rho sigma score + (sigma/rho) x_t)/(alpha sd)."""
    (signal, sigma), (signal_s, sigma_s) = (
        (sde.alpha(time) * sigma_data, sde.sigma(time)) for time in (t, s)
    )
    rho, rho_s = jnp.hypot(signal, sigma), jnp.hypot(signal_s, sigma_s)
    start, end = jnp.arctan2(sigma, signal), jnp.arctan2(sigma_s, signal_s)
    velocity = -sigma * (rho * _checks.call(score_fn, x_t, t) + x_t / rho) / signal
    return Interval(start, end, rho_s / rho, rho_s, 0.0), velocity


def _sde_step(
    key: Key, score_fn: ScoreFn, sde: SDE, x_t: Event, t: Scalar, s: Scalar, history: History
) -> tuple[Event, History]:
    x_s, history = _step(_noisy_data, 2, False, key, score_fn, sde, x_t, t, s, history)
    fresh = jnp.sqrt(-jnp.expm1(log_snr(sde, t) - log_snr(sde, s)))
    return x_s + sde.sigma(s) * fresh * jax.random.normal(key, x_t.shape, x_t.dtype), history


def _step(
    family: Callable,
    order: Scalar,
    corrected: Scalar,
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x_t: Event,
    t: Scalar,
    s: Scalar,
    history: History,
) -> tuple[Event, History]:
    """x_t corrected, then x_s, in the symbols of the module's docstring, with q_j = 1/r_j."""
    (start, end, ratio, scale, rate), value = family(score_fn, sde, x_t, t, s)
    h = end - start
    m = _moments(h, rate)
    q = jnp.where(jnp.arange(2) < order - 1, 1.0 / (history.clocks - start), 0.0)
    differences = history.values - value[None]
    corrected |= jnp.count_nonzero(q) < order - 2  # order 3 bears no first step of order 1
    x_t = x_t + history.gain * (value - history.foretold)
    x_s = ratio * x_t + scale * (m[0] * value + _interpolate(q, m[1], m[2], differences))
    error = m[1] - (q[0] + q[1]) * m[2] + q[0] * q[1] * m[3]
    return x_s, History(
        clocks=jnp.stack([start, history.clocks[0]]),
        values=jnp.stack([value, history.values[0]]),
        foretold=value + _interpolate(q, h, h**2, differences),
        gain=jnp.where(corrected, scale * error, 0.0) / (h * (1.0 - q[0] * h) * (1.0 - q[1] * h)),
    )


def _moments(h: Scalar, rate: float) -> Float[Array, " 4"]:
    """m_0 to m_3."""
    r = h * jnp.asarray(_NODES, h.dtype)
    weights = h * jnp.asarray(_WEIGHTS, h.dtype) * jnp.exp(rate * (r - h))
    return jnp.stack([jnp.sum(weights * r**k) for k in range(4)])


def _interpolate(q: Array, r: Scalar, r_squared: Scalar, differences: Array) -> Event:
    """p(r) − p(0) in Lagrange's form, linear in r and r²; or its integral, from their moments."""
    gap = jnp.where(q[0] == q[1], 1.0, q[0] - q[1])  # equal only where both are 0
    first = q[0] ** 2 * (r - q[1] * r_squared) / gap
    second = q[1] ** 2 * (r - q[0] * r_squared) / gap
    return first * differences[0] - second * differences[1]
