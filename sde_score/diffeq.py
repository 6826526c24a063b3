"""The one room that talks to diffrax: ODEs, ODEs with a log-density alongside, and the reverse
SDE.

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
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.divergence import divergence, hutchinson_divergence
from sde_score.sde import reverse_drift

Field = Callable[[Scalar, Any, Any], Any]  # (t, x, args) -> dx/dt
_MIN_RTOL_IN_EPS = 4  # an error estimate below a few roundings of the state is noise


class Solution(NamedTuple):
    """Where a solve ended, the states at the times of `saveat` (or None), and the number of
    network evaluations (of an implicit solver: its stages, without the root finder's).
    """

    x: Any
    trajectory: Any
    num_evals: Array


class Control(NamedTuple):
    """How a solve advances: on the grid `ts` if given, else adaptively to `rtol` and `atol` within
    `max_steps`, each at least `shortest` long.
    """

    ts: Array | None = None
    rtol: Scalar = 1e-5
    atol: Scalar = 1e-5
    max_steps: int = 4096
    shortest: Scalar | None = None


def make_control(
    ts: Array | None,
    rtol: Scalar | None,
    atol: Scalar | None,
    max_steps: int,
    default: Scalar = 1e-5,
) -> Control:
    """Fixed steps along `ts`, or else adaptive ones to the tolerances given or the default one."""
    if ts is not None and not (rtol is None and atol is None):
        raise _checks.ArgumentError(
            f"`ts` must not be given with `rtol` or `atol`; got rtol={rtol}, atol={atol}. A grid "
            "fixes the steps, tolerances adapt them: drop one."
        )
    rtol, atol = (default if tolerance is None else tolerance for tolerance in (rtol, atol))
    return Control(ts, rtol, atol, max_steps)


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
    _check_solver(solver)
    structure = solver.term_structure
    if not (isinstance(structure, type) and not issubclass(structure, diffrax.MultiTerm)):
        raise _checks.ArgumentError(
            f"`solver` must solve ODEs; got {_name(solver)}, which needs noise or a field in "
            "several parts. Use diffrax.Dopri5() or Tsit5()."
        )
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
    _check_solver(solver)
    converges = isinstance(
        solver, diffrax.AbstractItoSolver | diffrax.AbstractStratonovichSolver
    ) and not isinstance(solver, diffrax.AbstractFosterLangevinSRK)
    if not converges:
        raise _checks.ArgumentError(
            f"`solver` must converge for the reverse SDE; got {_name(solver)}, which is for ODEs "
            "or underdamped Langevin equations. Use diffrax.Euler(), Heun(), ShARK() or SRA1(), "
            "or sample_ode for the probability flow."
        )
    _check_brownian_tol(brownian_tol, control)
    if brownian_tol is None and control.ts is None:
        brownian_tol = 1e-5
    elif brownian_tol is None and control.ts is not None and adjoint is not None:
        brownian_tol = 0.5 * jnp.min(jnp.abs(jnp.diff(control.ts)))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if brownian_tol is None:
        path = diffrax.UnsafeBrownianPath(shape, key, _levy_area(solver))
    else:
        path = diffrax.VirtualBrownianTree(
            -start, -stop, brownian_tol, shape, key, _levy_area(solver)
        )
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(bind(_with_named_args, _reverse_drift_in_tau)),
        diffrax.ControlTerm(bind(_with_named_args, _reverse_diffusion_in_tau), path),
    )
    control = control._replace(
        ts=_negated(control.ts), shortest=None if brownian_tol is None else 2.0 * brownian_tol
    )
    args = (score_fn, sde)
    return _solve(terms, solver, x, args, -start, -stop, control, _negated(saveat), adjoint)


def _check_solver(solver: Any) -> None:
    if not isinstance(solver, diffrax.AbstractSolver):
        raise _checks.ArgumentError(
            "`solver` must be one of diffrax's solvers, an instance such as diffrax.Dopri5(); "
            f"got {solver!r}. Call the class, or pass the object rather than its name."
        )


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
    is_ode = isinstance(terms, diffrax.ODETerm)
    subs = [diffrax.SubSaveAt(t1=True)]
    if saveat is not None:
        subs.append(diffrax.SubSaveAt(ts=saveat))
    # jaxlib (0.10.2) takes registered dataclasses with equally many fields for the same structure,
    # so diffrax, which jits inside, would run VP's program for a VE. The name tells them apart.
    # And a Python number would be static there: another beta, another compilation.
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
            stepsize_controller=_controller(solver, control, is_ode, jax.tree.leaves(x)[0].dtype),
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
    num_evals = _evaluations(solver, out.stats["num_steps"])
    return Solution(last, None if saveat is None else out.ys[1], num_evals)


def _evaluations(solver: diffrax.AbstractSolver, num_steps: Array) -> Array:
    """How often `num_steps` steps evaluated the drift; a first-same-as-last step reuses one.

    The choice of the first step costs nothing: in diffrax 0.7.2 it is 0.01 for every equation.
    """
    tableau: Any = getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractSRK):
        ignored = 0 if tableau.ignore_stage_f is None else int(np.sum(tableau.ignore_stage_f))
        return num_steps * (len(tableau.b_sol) - ignored)
    if isinstance(solver, diffrax.AbstractERK):
        reused = 1 if tableau.fsal else 0
        return reused + num_steps * (tableau.num_stages - reused)
    if isinstance(solver, diffrax.ReversibleHeun):
        return 1 + num_steps
    return num_steps * getattr(tableau, "num_stages", 1)


def _controller(
    solver: diffrax.AbstractSolver, control: Control, is_ode: bool, dtype: Any
) -> diffrax.AbstractStepSizeController:
    if control.ts is not None:
        return diffrax.StepTo(control.ts)
    tableau: Any = getattr(solver, "tableau", None)
    stochastic = isinstance(solver, diffrax.AbstractSRK) and tableau.b_error is not None
    if not (stochastic or isinstance(solver, diffrax.AbstractAdaptiveSolver)):
        advice = "Dopri5() or Tsit5()" if is_ode else "ShARK() or SRA1()"
        raise _checks.ArgumentError(
            f"`solver` must estimate its error for adaptive steps; {_name(solver)} does not. "
            f"Give it a grid, ts=uniform_grid(sde, num_steps), or use diffrax.{advice}."
        )
    _checks.check_count("max_steps", control.max_steps)
    for name, tolerance in (("rtol", control.rtol), ("atol", control.atol)):
        _checks.check_positive(name, tolerance)
    _check_rtol(control.rtol, dtype)
    rtol, atol = jnp.asarray(control.rtol, dtype), jnp.asarray(control.atol, dtype)
    if is_ode:
        return diffrax.PIDController(rtol, atol)
    # Damped, as noise makes error estimates jump (diffrax's advice for SDEs).
    return diffrax.PIDController(
        rtol, atol, pcoeff=0.1, icoeff=0.3, dcoeff=0, dtmin=control.shortest
    )


def _check_rtol(rtol: Scalar, dtype: Any) -> None:
    lowest = _MIN_RTOL_IN_EPS * float(jnp.finfo(dtype).eps)
    if _checks.is_concrete(rtol) and rtol < lowest:
        raise _checks.ArgumentError(
            f"`rtol` must be at least {lowest:.2g}, {_MIN_RTOL_IN_EPS} roundings of {dtype}; got "
            f"{rtol}. Raise it, or compute in float64 with jax.enable_x64(True)."
        )


def _check_brownian_tol(tol: Scalar | None, control: Control) -> None:
    _checks.check_positive("brownian_tol", tol)
    if tol is None or control.ts is None or not _checks.is_concrete(tol, control.ts):
        return
    shortest = float(np.min(np.abs(np.diff(np.asarray(control.ts)))))
    if tol > shortest / 2:
        raise _checks.ArgumentError(
            f"`brownian_tol` must be at most half the shortest step, {shortest / 2:.3g}; got "
            f"{tol}. "
            "A coarser Brownian tree silently biases the samples: lower it or lengthen the steps."
        )


def _levy_area(solver: diffrax.AbstractSolver) -> type:
    needs = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    for area in (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea):
        if issubclass(area, needs):
            return area
    return diffrax.SpaceTimeTimeLevyArea


def _name(solver: diffrax.AbstractSolver) -> str:
    return type(solver).__name__
