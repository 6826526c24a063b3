"""Samplers that solve a differential equation with diffrax: the reverse SDE and the
probability-flow ODE.

Each takes any solver of diffrax's that converges for its equation. `ts` is a fixed, decreasing
grid; without one the steps adapt to `rtol` and `atol`. `saveat` is an array of decreasing times at
which to keep the state (between steps it is interpolated).
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks, diffeq
from sde_score._solvers import make_control
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind, travelling
from sde_score.diffeq import Field, Solution
from sde_score.parameterization import denoise
from sde_score.sampling.grid import Finish, initial_state, split_key, uniform_grid
from sde_score.sde import reverse_drift


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
    the solve, pass an `adjoint` such as diffrax.RecursiveCheckpointAdjoint(); with that, adaptive
    steps or a `brownian_tol` the noise is one Brownian path for the key, resolved to
    `brownian_tol` (half the shortest step of a grid; 1e-5 where steps adapt, of which none is
    shorter than twice that).
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
        probability_flow_field(score_fn, sde),
        x,
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
    **options: Any,
) -> Float[Array, "*event"]:
    """x moved along the probability-flow ODE from time `start` to `stop`: t0 → t1 encodes, t1 → t0
    decodes. Options as for `integrate`, which with `probability_flow_field(score_fn, sde)` keeps
    the trajectory too.
    """
    _checks.check_sde(sde)
    for name, t in (("start", start), ("stop", stop)):
        _checks.check_time(name, t, sde)
    field = probability_flow_field(score_fn, sde)
    return integrate(field, x, start=start, stop=stop, **options).x


def probability_flow_field(score_fn: ScoreFn, sde: SDE) -> Partial:
    """The vector field (x, t) -> f − ½ g² s of the probability-flow ODE (Song et al. 2021, eq.
    13).
    """
    return bind(_flow_velocity, score_fn, sde)


def _flow_velocity(score_fn: ScoreFn, sde: SDE, x: Array, t: Scalar) -> Array:
    return reverse_drift(score_fn, sde, x, t, churn=0.0)


def spherical_interpolation(
    x: Float[Array, "*event"], y: Float[Array, "*event"], weight: Scalar
) -> Float[Array, "*event"]:
    """(sin((1 − w) ω) x + sin(w ω) y)/sin ω, ω the angle between x and y: the arc from x at w = 0
    to y at w = 1 (Shoemake 1985).

    In many dimensions codes of N(0, I) lie near a sphere: the arc keeps their mean square at every
    w, of which the line keeps half at ½. Opposite codes have no arc.
    """
    for name, value in (("x", x), ("y", y)):
        _checks.check_data(name, value)
    _checks.check_shape("y", jnp.shape(y), jnp.shape(x), "Both are codes of one example.")
    x, y = _checks.at_least_float32(x), _checks.at_least_float32(y)
    unit_x, unit_y = x / jnp.linalg.norm(x), y / jnp.linalg.norm(y)
    # Not arccos of the cosine, which has no digits for small angles.
    omega = 2.0 * jnp.arctan2(jnp.linalg.norm(unit_x - unit_y), jnp.linalg.norm(unit_x + unit_y))
    arc = lambda w: w * jnp.sinc(w * omega / jnp.pi) / jnp.sinc(omega / jnp.pi)  # noqa: E731
    return arc(1.0 - weight) * x + arc(weight) * y


def integrate(
    field: Field,
    x: Float[Array, "*event"],
    *,
    start: Scalar,
    stop: Scalar,
    solver: diffrax.AbstractSolver | None = None,
    ts: Float[Array, " n"] | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    max_steps: int = 4096,
    saveat: Float[Array, " m"] | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Solution:
    """x moved along dx/dt = field(x, t) from time `start` to `stop`, either of which may be the
    larger, Dormand–Prince by default: a neural ODE where the field is a network (Chen et al.
    2018).

    A grid `ts` and the times of `saveat` run from `start` to `stop` too; without a grid the steps
    adapt to `rtol` and `atol`, 1e-5 by default. To differentiate with respect to what `field`
    holds, a pytree such as Partial(net.apply, params), pass an `adjoint`:
    diffrax.RecursiveCheckpointAdjoint() (exact gradients of the discrete solve),
    BacksolveAdjoint() (the adjoint ODE, gradients up to the tolerance; memory does not grow with
    the steps, but under vmap each example carries a gradient of all parameters) or
    DirectAdjoint().
    """
    _checks.check_data("x", x)
    x, start, stop, how = on_the_way(x, start, stop, solver, ts, rtol, atol, max_steps)
    saveat = _check_saveat(saveat, start, stop)
    field = bind(diffeq.like_x, field)
    return diffeq.solve_ode(field, x, start, stop, **how, saveat=saveat, adjoint=adjoint)


def on_the_way(
    x: Array,
    start: Scalar,
    stop: Scalar,
    solver: diffrax.AbstractSolver | None = None,
    ts: Array | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    max_steps: int = 4096,
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """x and the ends of its way in one dtype, and the solver and its steps between them."""
    x = _checks.at_least_float32(x)
    start, stop = jnp.asarray(start, x.dtype), jnp.asarray(stop, x.dtype)
    control = make_control(_check_ends(ts, start, stop), rtol, atol, max_steps)
    return x, start, stop, {"solver": solver or diffrax.Dopri5(), "control": control}


def _check_ends(ts: Array | None, start: Array, stop: Array) -> Array | None:
    """`ts` as an array, a grid from `start` to `stop`, which differ."""
    if _checks.is_concrete(start, stop) and np.asarray(start) == np.asarray(stop):
        raise _checks.ArgumentError(
            f"`stop` must differ from `start`; got {start} for both. Nothing flows in no time."
        )
    if ts is None:
        return None
    ts, wrong = jnp.asarray(ts, start.dtype), False
    if _checks.is_concrete(ts, start, stop):
        # numpy, as jnp makes a tracer even of constants that a traced function closes over
        times, first, last = (np.asarray(array) for array in (ts, start, stop))
        ends = times.size >= 2 and times[0] == first and times[-1] == last
        wrong = not (ends and np.all(np.sign(np.diff(times)) == np.sign(last - first)))
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
    saveat, wrong = jnp.asarray(saveat, start.dtype), False
    if _checks.is_concrete(saveat, start, stop):
        times, first, last = (np.asarray(array) for array in (saveat, start, stop))
        sign = np.sign(last - first)
        inside = (sign * times >= sign * first) & (sign * times <= sign * last)
        wrong = not (np.all(np.diff(sign * times) > 0) and np.all(inside))
    if saveat.ndim != 1 or saveat.size == 0 or wrong:
        raise _checks.ArgumentError(
            f"`saveat` must be an array of times in the solve's order, from {start} to {stop} at "
            f"the farthest; got {_checks.describe(saveat)}. Sort or clip it."
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
