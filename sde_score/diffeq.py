"""The room that talks to diffrax: ODEs, ODEs with a log-density alongside, and the reverse SDE.

Vector fields are module-level functions whose parameters travel in `args`, so new parameters never
recompile a solve. The reverse SDE is solved forwards in τ = −t: diffrax's stochastic Runge–Kutta
family needs increasing time, and τ keeps the floating-point resolution of t near the data. Its
noise is additive, so the Itô and the Stratonovich solutions agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float

from sde_score import _solvers
from sde_score._solvers import Control
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.divergence import divergence, hutchinson_divergence
from sde_score.sde import reverse_drift

Field = Callable[[Scalar, Any, Any], Any]  # (t, x, args) -> dx/dt


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
    args: Any,
    start: Scalar,
    stop: Scalar,
    *,
    solver: diffrax.AbstractSolver,
    control: Control,
    saveat: Array | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Solution:
    """Integrate dx/dt = field(t, x, args) from `start` to `stop`, in either direction."""
    _solvers.check_solves_odes(solver)
    terms = diffrax.ODETerm(bind(_with_named_args, field))
    return _solve(terms, solver, x, args, start, stop, control, saveat, adjoint)


def _with_named_args(field: Field, t: Scalar, x: Any, named_args: dict[str, Any]) -> Any:
    (args,) = named_args.values()
    return field(t, x, args)


def solve_ode_with_log_density(
    field: Field,
    x: Float[Array, "*event"],
    args: Any,
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
    augmented = bind(_with_divergence, field)
    solution = solve_ode(augmented, (x, change), (args, probes), start, stop, **options)
    return solution._replace(x=solution.x[0]), solution.x[1]


def _with_divergence(
    field: Field, t: Scalar, state: tuple[Array, Array], args: Any
) -> tuple[Array, Array]:
    (x, _), (args, probes) = state, args
    if probes is None:
        value, trace = divergence(lambda x: field(t, x, args), x)
        return value, trace[None]
    return hutchinson_divergence(lambda x: field(t, x, args), x, probes)


def flow_field(
    t: Scalar, x: Float[Array, "*event"], args: tuple[ScoreFn, SDE]
) -> Float[Array, "*event"]:
    """The probability-flow ODE's f − ½ g² s, with args = (score_fn, sde)."""
    return reverse_drift(*args, x, t, churn=0.0)


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
    _solvers.check_brownian_tol(brownian_tol, control)
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
        diffrax.ODETerm(bind(_with_named_args, _reverse_drift_in_tau)),
        diffrax.ControlTerm(bind(_with_named_args, _reverse_diffusion_in_tau), path),
    )
    control = control._replace(
        ts=_negated(control.ts), shortest=None if brownian_tol is None else 2.0 * brownian_tol
    )
    args = (score_fn, sde)
    return _solve(terms, solver, x, args, -start, -stop, control, _negated(saveat), adjoint)


def _negated(times: Array | None) -> Array | None:
    return None if times is None else -times


def _reverse_drift_in_tau(tau: Scalar, x: Array, args: tuple[ScoreFn, SDE]) -> Array:
    return -reverse_drift(*args, x, -tau)


def _reverse_diffusion_in_tau(
    tau: Scalar, x: Array, args: tuple[ScoreFn, SDE]
) -> lineax.DiagonalLinearOperator:
    return lineax.DiagonalLinearOperator(args[1].diffusion(-tau) * jnp.ones_like(x))


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
    subs = [diffrax.SubSaveAt(t1=True)]
    if saveat is not None:
        subs.append(diffrax.SubSaveAt(ts=saveat))
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
            saveat=diffrax.SaveAt(subs=subs),
            stepsize_controller=_solvers.controller(solver, control, is_ode, dtype),
            adjoint=diffrax.ForwardMode() if adjoint is None else adjoint,
            max_steps=control.max_steps if control.ts is None else control.ts.size - 1,
            throw=False,
        )
    assert out.ys is not None and out.stats is not None
    last = jax.tree.map(lambda leaf: leaf[0], out.ys[0])
    if control.ts is None:
        last = eqx.error_if(
            last,
            out.result != diffrax.RESULTS.successful,
            f"The solve did not reach its end within max_steps={control.max_steps}: raise "
            "`max_steps`, loosen `rtol` and `atol`, or look for a score that is not finite.",
        )
    num_evals = _solvers.evaluations(solver, out.stats["num_steps"])
    return Solution(last, None if saveat is None else out.ys[1], num_evals)
