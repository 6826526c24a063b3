"""The room that talks to diffrax: ODEs, ODEs with a log-density alongside, and the reverse SDE.

A vector field (x, t) -> dx/dt is a pytree that travels in diffrax's `args`: new parameters never
recompile a solve, and every adjoint finds them. The reverse SDE is solved forwards in τ = −t:
diffrax's stochastic Runge–Kutta family needs increasing time, and τ keeps the floating-point
resolution of t near the data. Its noise is additive, so the Itô and the Stratonovich solutions
agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float

from sde_score import _checks, _solvers
from sde_score._solvers import Control
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind, travelling
from sde_score.divergence import divergence, hutchinson_divergence
from sde_score.sde import reverse_drift

Field = Callable[[Any, Scalar], Any]  # (x, t) -> dx/dt


class Solution(NamedTuple):
    """Where a solve ended, the states at the times of `saveat` (or None), and the number of
    network evaluations (of an implicit solver: its stages, without the root finder's).
    """

    x: Any
    trajectory: Any
    num_evals: Array


def solve_ode(
    field: Field,
    x: Any,
    start: Scalar,
    stop: Scalar,
    *,
    solver: diffrax.AbstractSolver,
    control: Control,
    saveat: Array | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Solution:
    """Integrate dx/dt = field(x, t) from `start` to `stop`, in either direction."""
    _solvers.check_solves_odes(solver)
    terms, args = diffrax.ODETerm(_velocity), travelling(field)
    return _solve(terms, solver, x, args, start, stop, control, saveat, adjoint)


def _velocity(t: Scalar, x: Any, named_field: dict[str, Field]) -> Any:
    (field,) = named_field.values()
    return field(x, t)


def solve_ode_with_log_density(
    field: Field,
    x: Float[Array, "*event"],
    probes: Array | None,
    start: Scalar,
    stop: Scalar,
    **options: Any,
) -> tuple[Solution, Float[Array, " k"]]:
    """`solve_ode` and the integral of div field along the path: one for each probe, or the exact
    one if probes is None.

    d log p(x(t))/dt = −div field (Chen et al. 2018, thm 1). All estimates share the path and the
    step sizes.
    """
    change = jnp.zeros(1 if probes is None else probes.shape[0], x.dtype)
    augmented = bind(_with_divergence, bind(like_x, field), probes)
    solution = solve_ode(augmented, (x, change), start, stop, **options)
    return solution._replace(x=solution.x[0]), solution.x[1]


def like_x(field: Field, x: Float[Array, "*event"], t: Scalar) -> Float[Array, "*event"]:
    """field(x, t), checked to be like x."""
    return _checks.call(field, x, t, name="field")


def _with_divergence(
    field: Field, probes: Array | None, state: tuple[Array, Array], t: Scalar
) -> tuple[Array, Array]:
    x, _ = state
    if probes is None:
        value, trace = divergence(lambda x: field(x, t), x)
        return value, trace[None]
    return hutchinson_divergence(lambda x: field(x, t), x, probes)


def solve_reverse_sde(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x: Float[Array, "*event"],
    start: Scalar,
    stop: Scalar,
    *,
    solver: diffrax.AbstractSolver,
    control: Control,
    saveat: Array | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    brownian_tol: Scalar | None = None,
) -> Solution:
    """Integrate dx = [f − g² s] dt + g dw̄ from `start` down to `stop`.

    On a grid each step draws fresh increments (`UnsafeBrownianPath`). Adaptive steps, another
    adjoint or a `brownian_tol` take a `VirtualBrownianTree`: one fixed path for one key, whatever
    the steps. No step is shorter than twice its tolerance, below which its increments are wrong.
    """
    _solvers.check_solves_the_reverse_sde(solver)
    x = _solvers.check_brownian_tol(brownian_tol, control, x)
    forced = brownian_tol is None  # ours is so fine that a longer step than asked for is harmless
    if brownian_tol is None and control.ts is None:
        brownian_tol = 1e-5
    elif brownian_tol is None and control.ts is not None and adjoint is not None:
        brownian_tol = 0.5 * jnp.min(jnp.abs(jnp.diff(control.ts)))
    shape, area = jax.ShapeDtypeStruct(x.shape, x.dtype), _solvers.levy_area(solver)
    if brownian_tol is None:
        path = diffrax.UnsafeBrownianPath(shape, key, area)
    else:
        path = diffrax.VirtualBrownianTree(-start, -stop, brownian_tol, shape, key, area)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(_reverse_drift_in_tau),
        diffrax.ControlTerm(_reverse_diffusion_in_tau, path),
    )
    control = control._replace(
        ts=_negated(control.ts),
        shortest=None if brownian_tol is None else 2.0 * brownian_tol,
        forced=forced,
    )
    args = (score_fn, sde)
    return _solve(terms, solver, x, args, -start, -stop, control, _negated(saveat), adjoint)


def _negated(times: Array | None) -> Array | None:
    return None if times is None else -times


def _reverse_drift_in_tau(tau: Scalar, x: Array, named_args: dict[str, Any]) -> Array:
    ((score_fn, sde),) = named_args.values()
    return -reverse_drift(score_fn, sde, x, -tau)


def _reverse_diffusion_in_tau(
    tau: Scalar, x: Array, named_args: dict[str, Any]
) -> lineax.DiagonalLinearOperator:
    ((_, sde),) = named_args.values()
    return lineax.DiagonalLinearOperator(sde.diffusion(-tau) * jnp.ones_like(x))


def _solve(
    terms: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    x: Any,
    args: Any,
    start: Array,
    stop: Array,
    control: Control,
    saveat: Array | None,
    adjoint: diffrax.AbstractAdjoint | None,
) -> Solution:
    is_ode, dtype = isinstance(terms, diffrax.ODETerm), jax.tree.leaves(x)[0].dtype
    # diffrax jits inside, where a Python number would be static: another beta, one more program.
    # And jaxlib takes two SDEs of a user's, registered as JAX's dataclasses with equally many
    # fields, for one structure (see `register_pytree`). The name tells them apart.
    args = jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float | int) else leaf, args
    )
    named_args = {str(jax.tree.structure(args)): args}
    # TF32 and bfloat16 products would swamp the tolerances.
    with jax.default_matmul_precision("float32"):
        out = diffrax.diffeqsolve(
            terms,
            solver,
            start,
            stop,
            None,
            x,
            named_args,
            saveat=diffrax.SaveAt(ts=saveat, t1=True),  # not `subs`, for BacksolveAdjoint
            stepsize_controller=_solvers.controller(solver, control, is_ode, dtype),
            adjoint=_solvers.check_adjoint(adjoint, control),
            max_steps=control.max_steps if control.ts is None else control.ts.size - 1,
            throw=False,
        )
    assert out.ys is not None and out.stats is not None
    states, num_evals = out.ys, _solvers.evaluations(solver, out.stats["num_steps"])
    if control.ts is None or isinstance(solver, diffrax.AbstractImplicitSolver):
        # All results, lest jit drop the check with the one that is not used.
        states, num_evals = eqx.error_if(
            (states, num_evals), out.result != diffrax.RESULTS.successful, _incomplete(control)
        )
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    trajectory = None if saveat is None else jax.tree.map(lambda leaf: leaf[:-1], states)
    return Solution(last, trajectory, num_evals)


def _incomplete(control: Control) -> str:
    if control.ts is not None:
        return "The solver's root finder did not converge on the grid: take shorter steps."
    advice = "" if control.shortest is None else ", lower `brownian_tol`"
    return (
        f"The solve did not reach its end within max_steps={control.max_steps}: raise "
        f"`max_steps`, loosen `rtol` and `atol`{advice}, or look for a score that is not finite."
    )
