"""Time grids, decreasing from t1 to t0 (a grid is an array), and what takes a method along one:
`sample` one-step methods, `sample_multistep` those with a memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, Step, bind
from sde_score.parameterization import denoise
from sde_score.sampling.steps import euler_maruyama
from sde_score.sde import log_snr, sample_prior, time_of_log_snr

Finish = Callable[[ScoreFn, SDE, Array, Array], Array]


class Multistep(NamedTuple):
    """A method that remembers, as a pair of functions: what it carries, and one step.

    `init(x) -> state`; `step(key, score_fn, sde, x_t, t, s, state) -> (x_s, state)` with s < t.
    """

    init: Callable[[Array], Any]  # a pytree of arrays
    step: Callable[..., tuple[Array, Any]]


def uniform_grid(sde: SDE, num_steps: int) -> Float[Array, " num_steps+1"]:
    """Equal steps in t."""
    _checks.check_count("num_steps", num_steps)
    return jnp.linspace(sde.t1, sde.t0, num_steps + 1)


def log_snr_grid(sde: SDE, num_steps: int) -> Float[Array, " num_steps+1"]:
    """Equal steps in log-SNR (Lu et al. 2022, arXiv 2206.00927, sec. 3.3)."""
    _checks.check_count("num_steps", num_steps)
    lowest, highest = (log_snr(sde, jnp.asarray(t)) for t in (sde.t1, sde.t0))
    return _with_ends(sde, time_of_log_snr(sde, jnp.linspace(lowest, highest, num_steps + 1)))


def karras_grid(sde: SDE, num_steps: int, *, rho: float = 7.0) -> Float[Array, " num_steps+1"]:
    """Equal steps in (sigma/alpha)^{1/rho} (Karras et al. 2022, eq. 5)."""
    _checks.check_count("num_steps", num_steps)
    _checks.check_positive("rho", rho)
    largest, smallest = (
        jnp.exp(-0.5 * log_snr(sde, jnp.asarray(t)) / rho) for t in (sde.t1, sde.t0)
    )
    levels = jnp.linspace(largest, smallest, num_steps + 1)
    return _with_ends(sde, time_of_log_snr(sde, -2.0 * rho * jnp.log(levels)))


def _with_ends(sde: SDE, ts: Array) -> Array:
    return ts.at[0].set(sde.t1).at[-1].set(sde.t0)  # bisection leaves them a rounding error away


def sample(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    *,
    step: Step = euler_maruyama,
    ts: Float[Array, " n"] | None = None,
    init: Float[Array, "*shape"] | None = None,
    finish: Finish | None = denoise,
) -> Float[Array, "*shape"]:
    """One sample, by a `Step` in a scan along the grid `ts` (500 uniform steps by default).

    It starts from `init`, x at the first time, else from the prior, and ends with
    `finish(score_fn, sde, x, t)`, by default the posterior mean at the last time. For many
    samples, jax.vmap over keys: sample i depends on key i alone.
    """
    ts = uniform_grid(sde, 500) if ts is None else ts
    method = Multistep(_no_state, bind(_stateless, step))
    return sample_multistep(
        key, score_fn, sde, shape, method=method, ts=ts, init=init, finish=finish
    )


def sample_multistep(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    *,
    method: Multistep,
    ts: Float[Array, " n"],
    init: Float[Array, "*shape"] | None = None,
    finish: Finish | None = denoise,
) -> Float[Array, "*shape"]:
    """One sample, by a `Multistep` in a scan along the grid `ts`; all else as for `sample`."""
    prior_key, noise_key = split_key(key)
    _checks.check_grid(ts, sde)
    x = initial_state(prior_key, sde, shape, init, ts[0])
    ts = jnp.asarray(ts, x.dtype)

    def advance(carry: tuple, inputs: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        (x, state), (index, t, s) = carry, inputs
        noise = jax.random.fold_in(noise_key, index)
        new = method.step(noise, score_fn, sde, x, t, s, state)
        # An SDE of float64 numbers would widen a state of float32.
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new, (x, state)), None

    inputs = jnp.arange(ts.size - 1), ts[:-1], ts[1:]
    (x, _), _ = jax.lax.scan(advance, (x, method.init(x)), inputs)
    return x if finish is None else finish(score_fn, sde, x, ts[-1])


def _no_state(x: Array) -> tuple[()]:
    return ()


def _stateless(step: Step, *args: Any) -> tuple[Array, tuple[()]]:
    return step(*args[:-1]), ()


def split_key(key: Key) -> tuple[Key, Key]:
    """A sampler's keys: one for the prior, one for the noise."""
    _checks.check_key(key)
    prior_key, noise_key = jax.random.split(key)
    return prior_key, noise_key


def initial_state(
    key: Key, sde: SDE, shape: tuple[int, ...], init: Array | None, start: Scalar
) -> Float[Array, "*shape"]:
    """`init` if given, in at least float32; else a draw of the prior, the law at t1."""
    _checks.check_sde(sde)
    _checks.check_event_shape(shape)
    if init is None:
        fix = "The prior is the law at t1: to start elsewhere, give x there as `init`."
        _checks.check_end("ts[0]", start, "t1", sde.t1, fix)
        return sample_prior(key, sde, shape)
    _checks.check_data("init", init)
    fix = "It is x at the first time of one sample: jax.vmap over a batch."
    _checks.check_shape("init", jnp.shape(init), shape, fix)
    return _checks.at_least_float32(init)
