"""Log-likelihoods through the probability-flow ODE, with what is known of their error.

log p_t0(x_0) = log p_t1(x(t1)) + ∫ div(f − ½ g² s) dt along the flow from t0 to t1 (Song et al.
2021, eq. 39). Of its errors, `stderr` is the trace estimator's. The solver's falls with `rtol` and
`atol`; the truncation (the value is log p_t0, not log p_0) with the SDE's t0; the prior's mismatch
vanishes where `terminal_log_prob` is the true log p_t1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._solvers import make_control
from sde_score._typing import SDE, Key, Scalar, ScoreFn, travelling
from sde_score.diffeq import flow_field, solve_ode_with_log_density
from sde_score.divergence import rademacher_probes
from sde_score.sde import prior_log_prob


class Likelihood(NamedTuple):
    """log p_t0(x_0) and the standard error of its trace estimate, in nats; x(t1); and evaluations
    of score and trace.
    """

    log_prob: Array
    stderr: Array
    latent: Array
    num_evals: Array


def log_likelihood(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "*event"],
    *,
    num_probes: int = 1,
    probes: Callable = rademacher_probes,
    **options: Any,
) -> Likelihood:
    """log p_t0(x_0) of one example, the trace estimated by `num_probes` probes that are drawn once
    (Hutchinson).

    The mean over probes has a Student t error with num_probes − 1 degrees of freedom and scale
    `stderr`, which is nan for one probe. In few dimensions (d ≤ 8) take `gaussian_probes` or
    `exact_log_likelihood`: signs take too few values there. Options as for `exact_log_likelihood`.
    """
    _checks.check_key(key)
    _checks.check_count("num_probes", num_probes)
    _checks.check_data("x0", x0)
    return _log_likelihood(score_fn, sde, x0, probes(key, num_probes, jnp.shape(x0)), **options)


def exact_log_likelihood(
    score_fn: ScoreFn, sde: SDE, x0: Float[Array, "*event"], **options: Any
) -> Likelihood:
    """log p_t0(x_0) of one example with the exact trace, at d Jacobian products an evaluation;
    `stderr` is 0.

    Options: `terminal_log_prob(x)`, the log-density at t1 (the prior's by default), and as for
    `probability_flow` `solver`, `ts`, `rtol`, `atol`, `max_steps`, `adjoint`.
    """
    _checks.check_data("x0", x0)
    return _log_likelihood(score_fn, sde, x0, None, **options)


def _log_likelihood(
    score_fn: ScoreFn,
    sde: SDE,
    x0: Array,
    probes: Array | None,
    *,
    terminal_log_prob: Callable[[Array], Scalar] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    ts: Float[Array, " n"] | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Likelihood:
    _checks.check_sde(sde)
    x0 = _checks.at_least_float32(x0)
    probes = None if probes is None else probes.astype(x0.dtype)
    if ts is not None:
        _checks.check_grid(ts, sde)
        fix = "The value is log p_t0: change the SDE's ends with dataclasses.replace."
        _checks.check_end("ts[0]", ts[0], "t1", sde.t1, fix)
        _checks.check_end("ts[-1]", ts[-1], "t0", sde.t0, fix)
        ts = jnp.asarray(ts, x0.dtype)[::-1]
    start, stop = (jnp.asarray(t, x0.dtype) for t in (sde.t0, sde.t1))
    if ts is not None:
        start, stop = ts[0], ts[-1]
    solution, changes = solve_ode_with_log_density(
        flow_field,
        x0,
        (travelling(score_fn), sde),
        probes,
        start,
        stop,
        solver=solver or diffrax.Dopri5(),
        control=make_control(ts, rtol, atol, max_steps),
        adjoint=adjoint,
    )
    terminal = (
        prior_log_prob(sde, solution.x)
        if terminal_log_prob is None
        else terminal_log_prob(solution.x)
    )
    terminal = _checks.check_scalar("terminal_log_prob", terminal, "one example")
    stderr = jnp.zeros_like(changes[0]) if probes is None else _standard_error(changes)
    return Likelihood(terminal + jnp.mean(changes), stderr, solution.x, solution.num_evals)


def _standard_error(values: Float[Array, " k"]) -> Scalar:
    if values.size < 2:
        return jnp.full((), jnp.nan, values.dtype)
    return jnp.std(values, ddof=1) / jnp.sqrt(values.size)


def bits_per_dim(log_prob: Scalar, num_dims: int, *, bin_width: float) -> Scalar:
    """−log_prob/(D ln 2) − log2(bin_width): the code length of dequantised data, in bits for each
    of its D numbers.

    `bin_width` is the distance of neighbouring levels in the units of the model's data: 1/256 for
    8-bit images in [0, 1] (an offset of 8 bits), 2/256 in [−1, 1] (7 bits).
    """
    _checks.check_count("num_dims", num_dims)
    _checks.check_positive("bin_width", bin_width)
    return -log_prob / (num_dims * jnp.log(2.0)) - jnp.log2(bin_width)


def uniform_dequantize(key: Key, levels: Array, num_levels: int) -> Float[Array, "*shape"]:
    """(levels + u)/num_levels in [0, 1) with u ~ U[0, 1), for integers 0 … num_levels − 1 (Theis
    et al. 2016, sec. 3.1).

    The mean log-density of the result bounds the log-probability of the integers from below.
    """
    _checks.check_key(key)
    _checks.check_count("num_levels", num_levels, 2)
    levels = jnp.asarray(levels)
    if not jnp.issubdtype(levels.dtype, jnp.integer):
        raise _checks.ArgumentError(
            f"`levels` must be integers 0 … {num_levels - 1}; got {levels.dtype}. Undo the "
            "scaling of the data first."
        )
    known = np.asarray(levels) if _checks.is_concrete(levels) else np.zeros(1)  # numpy widens 256
    if np.any(known < 0) or np.any(known >= num_levels):
        raise _checks.ArgumentError(
            f"`levels` must lie in 0 … {num_levels - 1}; got {_checks.describe(levels)}. Raise "
            "`num_levels`."
        )
    x = (levels + jax.random.uniform(key, levels.shape)) / num_levels
    return jnp.minimum(x, 1.0 - jnp.finfo(x.dtype).epsneg)  # the sum may have rounded up
