"""Langevin dynamics: plain, annealed over noise levels, and Metropolis-adjusted."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.parameterization import denoise
from sde_score.sampling.grid import Finish, initial_state, split_key

Event = Float[Array, "*event"]


def langevin_sample(
    key: Key, score_fn: ScoreFn, x: Float[Array, "*event"], *, step_size: Scalar, num_steps: int
) -> Float[Array, "*event"]:
    """`num_steps` of x ← x + (ε/2) s(x) + √ε z with ε = `step_size` (Welling & Teh 2011, eq. 3),
    from any start x.

    Unadjusted: its stationary law is off by O(ε); for N(0, I) the variance is 1/(1 − ε/4).
    """
    _checks.check_key(key)
    _checks.check_data("x", x)
    _checks.check_count("num_steps", num_steps)
    _checks.check_positive("step_size", step_size)
    x = _checks.at_least_float32(x)
    step_size = jnp.asarray(step_size, x.dtype)

    def move(index: Array, x: Array) -> Array:
        noise = jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
        return x + 0.5 * step_size * _checks.call(score_fn, x) + jnp.sqrt(step_size) * noise

    return jax.lax.fori_loop(0, num_steps, move, x)


def annealed_langevin_sample(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    *,
    ts: Float[Array, " levels"],
    step_size: Scalar,
    num_steps: int,
    init: Float[Array, "*shape"] | None = None,
    finish: Finish | None = denoise,
) -> Float[Array, "*shape"]:
    """At each time of `ts`, `num_steps` of `langevin_sample` on s(·, t) with ε = step_size
    (sigma(t)/sigma(ts[-1]))² (Song & Ermon 2019, arXiv 1907.05600, alg. 1).

    It starts from `init`, else from the prior, and ends with `finish`, by default the posterior
    mean. `uniform_grid(VE(sigma_min, sigma_max, t0=0.0), L − 1)` has the papers' L geometric
    levels: NCSN 1 to 0.01 in 10, num_steps=100, finish=None; NCSNv2 (arXiv 2006.09011) 50 to
    0.01 in 232, num_steps=5; both from uniform noise. NCSN's algorithm moves as here; its code,
    and NCSNv2's algorithm and code, move by ε s + √(2ε) z: their ε = 2e-5 and 6.2e-6, as run, are
    step_size = 4e-5 and 1.24e-5.
    """
    _checks.check_grid(ts, sde)
    _checks.check_positive("step_size", step_size)
    prior_key, noise_key = split_key(key)
    x = initial_state(prior_key, sde, shape, init, ts[0])
    ts = jnp.asarray(ts, x.dtype)

    def level(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        index, t = inputs
        size = step_size * (sde.sigma(t) / sde.sigma(ts[-1])) ** 2
        score = bind(_at_time, score_fn, t)
        key = jax.random.fold_in(noise_key, index)
        return langevin_sample(key, score, x, step_size=size, num_steps=num_steps), None

    x, _ = jax.lax.scan(level, x, (jnp.arange(ts.size), ts))
    return x if finish is None else finish(score_fn, sde, x, ts[-1])


class MALA(NamedTuple):
    """The last state of a Metropolis-adjusted chain, and the fraction of its moves accepted."""

    x: Float[Array, "*event"]
    acceptance: Scalar


def mala_sample(
    key: Key,
    log_prob: Callable[[Event], Scalar],
    x: Float[Array, "*event"],
    *,
    step_size: Scalar,
    num_steps: int,
) -> MALA:
    """`langevin_sample`, each of whose moves x to y is accepted with probability min(1, p(y)
    q(x | y) / (p(x) q(y | x))), q(y | x) = N(y; x + (ε/2) ∇ log p(x), ε I) (Roberts & Tweedie
    1996, sec. 1.4).

    `log_prob` is log p up to a constant; p is left invariant whatever ε is. Moves as long as
    leave an acceptance of about 0.57 mix best (Roberts & Rosenthal 1998).
    """
    _checks.check_key(key)
    _checks.check_data("x", x)
    _checks.check_count("num_steps", num_steps)
    _checks.check_positive("step_size", step_size)
    x = _checks.at_least_float32(x)
    step_size = jnp.asarray(step_size, x.dtype)

    def evaluate(x: Array) -> tuple[Array, Array, Array]:
        density = lambda x: _checks.check_scalar("log_prob", log_prob(x), "one example")  # noqa: E731
        return x, *jax.value_and_grad(density)(x)

    def log_move(x: Array, score: Array, y: Array) -> Array:
        return -0.5 * jnp.sum((y - x - 0.5 * step_size * score) ** 2) / step_size

    def move(index: Array, carry: tuple) -> tuple:
        state, accepted = carry
        noise_key, accept_key = jax.random.split(jax.random.fold_in(key, index))
        x, value, score = state
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        proposal = evaluate(x + 0.5 * step_size * score + jnp.sqrt(step_size) * noise)
        y, new_value, new_score = proposal
        log_ratio = new_value - value + log_move(y, new_score, x) - log_move(x, score, y)
        accept = jnp.log(jax.random.uniform(accept_key)) < log_ratio  # nan rejects
        return jax.tree.map(partial(jnp.where, accept), proposal, state), accepted + accept

    (x, _, _), accepted = jax.lax.fori_loop(0, num_steps, move, (evaluate(x), 0))
    return MALA(x, accepted / num_steps)


def _at_time(score_fn: ScoreFn, t: Scalar, x: Event) -> Event:
    return score_fn(x, t)
