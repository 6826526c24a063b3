"""What diffrax's solvers need, how they step, what they cost, and which of them do not serve."""

from typing import Any, NamedTuple

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import Scalar

_MIN_RTOL_IN_EPS = 4  # an error estimate below a few roundings of the state is noise


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


def check_brownian_tol(tol: Scalar | None, control: Control) -> None:
    """`tol` resolves the shortest step of a grid."""
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


def levy_area(solver: diffrax.AbstractSolver) -> type:
    """The least Lévy area of the Brownian path that `solver` takes."""
    needs = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    for area in (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea):
        if issubclass(area, needs):
            return area
    return diffrax.SpaceTimeTimeLevyArea


def _name(solver: diffrax.AbstractSolver) -> str:
    return type(solver).__name__
