"""What diffrax's solvers need, how they step, what they cost, and which of them do not serve."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import Scalar

_MIN_RTOL_IN_EPS = 4  # an error estimate below a few roundings of the state is noise


class Control(NamedTuple):
    """How a solve advances: on the grid `ts` if given, else adaptively to `rtol` and `atol` within
    `max_steps`, each at least `shortest` long: where one would have to be shorter it is `forced`
    to be so long, or the solve fails.
    """

    ts: Array | None = None
    rtol: Scalar = 1e-5
    atol: Scalar = 1e-5
    max_steps: int = 4096
    shortest: Scalar | None = None
    forced: bool = False


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


def check_solves_odes(solver: Any) -> None:
    """`solver` takes a vector field alone."""
    _check_is_solver(solver)
    structure = solver.term_structure
    if not (isinstance(structure, type) and not issubclass(structure, diffrax.MultiTerm)):
        raise _checks.ArgumentError(
            f"`solver` must solve ODEs; got {_name(solver)}, which needs noise or a field in "
            "several parts. Use diffrax.Dopri5() or Tsit5()."
        )


def check_solves_the_reverse_sde(solver: Any) -> None:
    """`solver` converges for additive noise."""
    _check_is_solver(solver)
    converges = diffrax.AbstractItoSolver | diffrax.AbstractStratonovichSolver
    langevin = isinstance(solver, diffrax.AbstractFosterLangevinSRK)
    if langevin or not isinstance(solver, converges):
        raise _checks.ArgumentError(
            f"`solver` must converge for the reverse SDE; got {_name(solver)}, which is for ODEs "
            "or underdamped Langevin equations. Use diffrax.Euler(), Heun(), ShARK() or SRA1(), "
            "or sample_ode for the probability flow."
        )


def _check_is_solver(solver: Any) -> None:
    if not isinstance(solver, diffrax.AbstractSolver):
        raise _checks.ArgumentError(
            "`solver` must be one of diffrax's solvers, an instance such as diffrax.Dopri5(); "
            f"got {solver!r}. Call the class, or pass the object rather than its name."
        )
    if isinstance(solver, diffrax.HalfSolver):
        raise _checks.ArgumentError(
            f"`solver` must not be a HalfSolver, whose evaluations are not counted; got {solver}. "
            "Use one with an error estimate of its own, such as Dopri5() or SRA1()."
        )


def evaluations(solver: diffrax.AbstractSolver, num_steps: Array) -> Array:
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


def controller(
    solver: diffrax.AbstractSolver, control: Control, is_ode: bool, dtype: Any
) -> diffrax.AbstractStepSizeController:
    """The step-size controller: a grid, or proportional–integral control of the error."""
    if control.ts is not None:
        finder = getattr(solver, "root_finder", None)
        if finder is not None and not isinstance(finder.rtol, int | float):
            raise _checks.ArgumentError(
                f"`solver` must know its tolerances on a grid; {_name(solver)}'s root finder "
                "takes those of adaptive steps. Drop `ts`, or give the solver a root finder: "
                "diffrax.ImplicitEuler(root_finder=diffrax.VeryChord(rtol=1e-5, atol=1e-5))."
            )
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
    check_rtol(control.rtol, dtype)
    rtol, atol = jnp.asarray(control.rtol, dtype), jnp.asarray(control.atol, dtype)
    if is_ode:
        # Damped: where a score is stiff, as near the data, undamped steps overshoot. A trained
        # score took 181 evaluations in place of 229, four others from 133/145 to 97/91.
        return diffrax.PIDController(rtol, atol, icoeff=0.7)
    # Damped, as noise makes error estimates jump (diffrax's advice for SDEs). A step that would
    # have to be shorter than a user's Brownian tree resolves fails: forced, it biases the samples.
    return diffrax.PIDController(
        *(rtol, atol), pcoeff=0.1, icoeff=0.3, dtmin=control.shortest, force_dtmin=control.forced
    )


def check_rtol(rtol: Scalar, dtype: Any) -> None:
    """`rtol` is within reach of the floating-point type."""
    lowest = _MIN_RTOL_IN_EPS * float(jnp.finfo(dtype).eps)
    if _checks.is_concrete(rtol) and rtol < lowest:
        raise _checks.ArgumentError(
            f"`rtol` must be at least {lowest:.2g}, {_MIN_RTOL_IN_EPS} roundings of {dtype}; got "
            f"{rtol}. Raise it, or compute in float64 with jax.enable_x64(True)."
        )


def check_adjoint(
    adjoint: diffrax.AbstractAdjoint | None, control: Control
) -> diffrax.AbstractAdjoint:
    """How to differentiate: forward mode by default; backwards in time only with steps that adapt,
    and not in silence where these do not arrive.
    """
    adjoint = diffrax.ForwardMode() if adjoint is None else adjoint
    if not isinstance(adjoint, diffrax.AbstractAdjoint):
        raise _checks.ArgumentError(
            "`adjoint` must be one of diffrax's adjoints, an instance such as "
            f"diffrax.RecursiveCheckpointAdjoint(); got {adjoint!r}. Call the class, or pass the "
            "object rather than its name."
        )
    if not isinstance(adjoint, diffrax.BacksolveAdjoint):
        return adjoint
    if control.ts is not None and "stepsize_controller" not in adjoint.kwargs:
        raise _checks.ArgumentError(
            "`adjoint` must not be BacksolveAdjoint on a grid `ts`, which does not run backwards. "
            "Drop `ts`, or use diffrax.RecursiveCheckpointAdjoint()."
        )
    return diffrax.BacksolveAdjoint(**{"throw": True} | adjoint.kwargs)


def check_brownian_tol(tol: Scalar | None, control: Control, x: Array) -> Array:
    """x, if `tol` resolves the shortest step of a grid: checked in the program where traced."""
    _checks.check_positive("brownian_tol", tol)
    if tol is None or control.ts is None:
        return x
    rounding = jnp.finfo(control.ts.dtype).eps * jnp.max(jnp.abs(control.ts))
    largest = 0.5 * jnp.min(jnp.abs(jnp.diff(control.ts))) + rounding
    rule = "`brownian_tol` must be at most half the shortest step"
    fix = "A coarser Brownian tree silently biases the samples: lower it or lengthen the steps."
    if not _checks.is_concrete(tol, largest):
        return eqx.error_if(x, tol > largest, f"{rule}. {fix}")
    if tol > largest:
        raise _checks.ArgumentError(f"{rule}, {float(largest):.3g}; got {tol}. {fix}")
    return x


def levy_area(solver: diffrax.AbstractSolver) -> type:
    """The least Lévy area of the Brownian path that `solver` takes."""
    needs = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    for area in (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea):
        if issubclass(area, needs):
            return area
    return diffrax.SpaceTimeTimeLevyArea


def _name(solver: diffrax.AbstractSolver) -> str:
    return type(solver).__name__
