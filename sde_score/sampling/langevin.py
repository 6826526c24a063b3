"""Langevin dynamics for a score without time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar, ScoreFn


def langevin_sample(
    key: Key, score_fn: ScoreFn, x: Float[Array, "*event"], *, step_size: Scalar, num_steps: int
) -> Float[Array, "*event"]:
    """`num_steps` of x ← x + (ε/2) s(x) + √ε z with ε = `step_size` (Welling & Teh 2011, eq. 4),
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
