"""`fit_grid`: the time grid that suits one model, one sampler and one number of steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn
from sde_score.sampling.grid import initial_state, karras_grid, log_snr_grid, uniform_grid
from sde_score.sde import log_snr, time_of_log_snr

_SHORTEST = 0.01  # increment, of the equal one: distinct times in float32


def fit_grid(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    num_steps: int,
    *,
    sampler: Callable,
    num_samples: int = 256,
    num_iterations: int = 40,
    fine_steps: int = 256,
) -> Float[Array, " num_steps+1"]:
    """The grid of `num_steps` steps from t1 to t0 with the least mean ‖x − x*‖², where x* is what
    the same sampler makes of the same start with `fine_steps` steps.

    `sampler` is a deterministic one with its options bound, called as `sampler(key, score_fn, sde,
    shape, ts=ts, init=x)`: functools.partial(sample, step=heun, finish=None), say. The increments
    of log-SNR are a softmax; their logits are fitted to `num_samples` starts by the method of
    Levenberg and Marquardt with Jacobians in forward mode, from the best of the three standard
    grids. An iteration costs up to 2 (num_steps + 1) solves of all samples.
    """
    for name, count in (
        ("num_steps", num_steps),
        ("num_samples", num_samples),
        ("num_iterations", num_iterations),
        ("fine_steps", fine_steps),
    ):
        _checks.check_count(name, count)
    _checks.check_key(key)
    prior_key, key = jax.random.split(key)
    draw = lambda key: initial_state(key, sde, shape, None, sde.t1)  # noqa: E731
    starts = jax.vmap(draw)(jax.random.split(prior_key, num_samples))

    def solve(ts: Array) -> Array:
        keyed = lambda x: sampler(jax.random.clone(key), score_fn, sde, shape, ts=ts, init=x)  # noqa: E731
        return jax.vmap(keyed)(starts)

    target = solve(log_snr_grid(sde, fine_steps))
    error = lambda logits: jnp.ravel(solve(_grid(sde, logits)) - target)  # noqa: E731
    grids = [make(sde, num_steps) for make in (uniform_grid, log_snr_grid, karras_grid)]
    starting = jnp.stack([jnp.log(jnp.diff(log_snr(sde, ts))) for ts in grids])
    costs = jax.lax.map(lambda logits: jnp.sum(error(logits) ** 2), starting)
    best = starting[jnp.nanargmin(costs)]
    return _grid(sde, _least_squares(error, best, num_iterations))


def _grid(sde: SDE, logits: Float[Array, " n"]) -> Float[Array, " n+1"]:
    """Times whose increments of log-SNR are a softmax: in order, with fixed ends."""
    increments = (jax.nn.softmax(logits) + _SHORTEST / logits.size) / (1.0 + _SHORTEST)
    lowest, highest = (log_snr(sde, jnp.asarray(t, logits.dtype)) for t in (sde.t1, sde.t0))
    inner = lowest + (highest - lowest) * jnp.cumsum(increments)[:-1]
    ts = jnp.pad(time_of_log_snr(sde, inner), 1)
    return ts.at[0].set(sde.t1).at[-1].set(sde.t0)


def _least_squares(
    error: Callable[[Array], Array], params: Float[Array, " n"], num_iterations: int
) -> Float[Array, " n"]:
    """Levenberg–Marquardt: a step solves (JᵀJ + damping I) δ = −Jᵀe, and is taken if it helps."""

    def improve(_: int, state: tuple[Array, Array, Scalar]) -> tuple[Array, Array, Scalar]:
        params, e, damping = state
        jacobian = jax.jacfwd(error)(params)
        normal = jnp.matmul(jacobian.T, jacobian, precision="highest")
        gradient = jnp.matmul(e, jacobian, precision="highest")
        ridge = damping * jnp.trace(normal) / params.size * jnp.eye(params.size)
        candidate = params - jnp.linalg.solve(normal + ridge, gradient)
        new = error(candidate)
        better = jnp.sum(new**2) < jnp.sum(e**2)  # false for nan too
        params, e = jnp.where(better, candidate, params), jnp.where(better, new, e)
        return params, e, jnp.maximum(damping * jnp.where(better, 0.3, 4.0), 1e-6)

    state = params, error(params), jnp.ones((), params.dtype)
    return jax.lax.fori_loop(0, num_iterations, improve, state)[0]
