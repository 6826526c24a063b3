"""Samplers that solve a differential equation with diffrax: the reverse SDE and the
probability-flow ODE.

Each takes any solver of diffrax's that converges for its equation. `ts` is a fixed, decreasing
grid; without one the steps adapt to `rtol` and `atol`. `saveat` is an array of decreasing times at
which to keep the state (between steps it is interpolated).
"""

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks, diffeq
from sde_score._solvers import make_control
from sde_score._typing import SDE, Key, Scalar, ScoreFn, travelling
from sde_score.diffeq import Solution, flow_field
from sde_score.parameterization import denoise
from sde_score.sampling.grid import Finish, initial_state, split_key, uniform_grid


def solve_sde(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    *,
    solver: diffrax.AbstractSolver | None = None,
    ts: Float[Array, " n"] | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    max_steps: int = 16384,
    init: Float[Array, "*shape"] | None = None,
    finish: Finish | None = denoise,
    saveat: Float[Array, " m"] | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    brownian_tol: Scalar | None = None,
) -> Solution:
    """One sample of the reverse SDE dx = [f − g² s] dt + g dw̄ (Song et al. 2021, eq. 6), by
    Euler's method by default.

    Fixed steps along `ts` (500 uniform ones by default); adaptive ones if `rtol` or `atol` is
    given (ShARK then is the default solver). `finish` as for `sample`. To differentiate through
    the solve, pass an `adjoint`; with that, adaptive steps or a `brownian_tol` the noise is one
    Brownian path for the key, resolved to `brownian_tol`.
    """
    prior_key, noise_key = split_key(key)
    adaptive = ts is None and not (rtol is None and atol is None)
    ts = uniform_grid(sde, 500) if ts is None and not adaptive else ts
    start, stop, ts, x = _prepare(prior_key, sde, shape, ts, init)
    control = make_control(ts, rtol, atol, max_steps, 1e-3)
    solution = diffeq.solve_reverse_sde(
        noise_key,
        travelling(score_fn),
        sde,
        x,
        start,
        stop,
        solver=solver or (diffrax.ShARK() if adaptive else diffrax.Euler()),
        control=control,
        saveat=_check_saveat(saveat, start, stop),
        adjoint=adjoint,
        brownian_tol=brownian_tol,
    )
    return _finished(solution, finish, score_fn, sde, stop)


def solve_ode(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    *,
    solver: diffrax.AbstractSolver | None = None,
    ts: Float[Array, " n"] | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    max_steps: int = 4096,
    init: Float[Array, "*shape"] | None = None,
    finish: Finish | None = None,
    saveat: Float[Array, " m"] | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Solution:
    """One sample of the probability-flow ODE dx/dt = f − ½ g² s (Song et al. 2021, eq. 13),
    Dormand–Prince by default.

    The key draws the start from the prior; from there the path is deterministic. Steps adapt to
    `rtol` and `atol`, 1e-5 by default, unless `ts` fixes them. Nothing is denoised at the end by
    default: the map from the prior stays a bijection, the one whose likelihood is computed.
    """
    prior_key, _ = split_key(key)
    start, stop, ts, x = _prepare(prior_key, sde, shape, ts, init)
    solution = diffeq.solve_ode(
        flow_field,
        x,
        (travelling(score_fn), sde),
        start,
        stop,
        solver=solver or diffrax.Dopri5(),
        control=make_control(ts, rtol, atol, max_steps),
        saveat=_check_saveat(saveat, start, stop),
        adjoint=adjoint,
    )
    return _finished(solution, finish, score_fn, sde, stop)


def sample_sde(
    key: Key, score_fn: ScoreFn, sde: SDE, shape: tuple[int, ...], **options: object
) -> Array:
    """`solve_sde(...).x`: one sample of the reverse SDE; the same arguments."""
    return solve_sde(key, score_fn, sde, shape, **options).x  # type: ignore[arg-type]


def sample_ode(
    key: Key, score_fn: ScoreFn, sde: SDE, shape: tuple[int, ...], **options: object
) -> Array:
    """`solve_ode(...).x`: one sample of the probability-flow ODE; the same arguments."""
    return solve_ode(key, score_fn, sde, shape, **options).x  # type: ignore[arg-type]


def probability_flow(
    score_fn: ScoreFn,
    sde: SDE,
    x: Float[Array, "*event"],
    *,
    start: Scalar,
    stop: Scalar,
    solver: diffrax.AbstractSolver | None = None,
    ts: Float[Array, " n"] | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Float[Array, "*event"]:
    """x moved along the probability-flow ODE from time `start` to `stop`: t0 → t1 encodes, t1 → t0
    decodes. A grid `ts` runs from `start` to `stop` too; without one the steps adapt to `rtol` and
    `atol`, 1e-5 by default.
    """
    _checks.check_data("x", x)
    _checks.check_sde(sde)
    for name, t in (("start", start), ("stop", stop)):
        _checks.check_time(name, t, sde)
    x = _checks.at_least_float32(x)
    start, stop = jnp.asarray(start, x.dtype), jnp.asarray(stop, x.dtype)
    return diffeq.solve_ode(
        flow_field,
        x,
        (travelling(score_fn), sde),
        start,
        stop,
        solver=solver or diffrax.Dopri5(),
        control=make_control(_check_ends(ts, start, stop), rtol, atol, max_steps),
        adjoint=adjoint,
    ).x


def _check_ends(ts: Array | None, start: Array, stop: Array) -> Array | None:
    if ts is None:
        return None
    ts = jnp.asarray(ts, start.dtype)
    wrong = _checks.is_concrete(ts, start, stop) and not (
        ts.size >= 2
        and bool((ts[0] == start) & (ts[-1] == stop))
        and bool(jnp.all(jnp.sign(jnp.diff(ts)) == jnp.sign(stop - start)))
    )
    if ts.ndim != 1 or wrong:
        raise _checks.ArgumentError(
            f"`ts` must be a grid that runs from start={start} to stop={stop}; got "
            f"{_checks.describe(ts)}. Reverse uniform_grid(sde, num_steps) to encode."
        )
    return ts


def _prepare(
    key: Key, sde: SDE, shape: tuple[int, ...], ts: Array | None, init: Array | None
) -> tuple[Array, Array, Array | None, Array]:
    """The first and the last time, the grid, and the state at the first time, in one dtype."""
    if ts is not None:
        _checks.check_grid(ts, sde)
    start, stop = (sde.t1, sde.t0) if ts is None else (ts[0], ts[-1])
    x = initial_state(key, sde, shape, init, start)
    ts = None if ts is None else jnp.asarray(ts, x.dtype)
    return jnp.asarray(start, x.dtype), jnp.asarray(stop, x.dtype), ts, x


def _check_saveat(saveat: Array | None, start: Array, stop: Array) -> Array | None:
    if saveat is None:
        return None
    saveat = jnp.asarray(saveat, start.dtype)
    wrong = _checks.is_concrete(saveat, start, stop) and not bool(
        jnp.all(jnp.diff(saveat) < 0) & jnp.all((saveat <= start) & (saveat >= stop))
    )
    if saveat.ndim != 1 or saveat.size == 0 or wrong:
        raise _checks.ArgumentError(
            f"`saveat` must be an array of decreasing times from {start} at most to {stop} at "
            f"least, the solve's ends; got {_checks.describe(saveat)}. Sort or clip it."
        )
    return saveat


def _finished(
    solution: Solution, finish: Finish | None, score_fn: ScoreFn, sde: SDE, stop: jax.Array
) -> Solution:
    if finish is None:
        return solution
    return solution._replace(
        x=finish(score_fn, sde, solution.x, stop), num_evals=solution.num_evals + 1
    )
