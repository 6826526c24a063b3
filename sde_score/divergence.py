"""The divergence tr(∂f/∂x) of a vector field, exact or estimated, together with the field's value.

Both come from one linearisation (`jax.linearize`): the value is paid for once, each direction is
one Jacobian-vector product. Hutchinson's estimator is vᵀ (∂f/∂x) v with E[v vᵀ] = I (Hutchinson
1990; Grathwohl et al. 2018, sec. 3.1).
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar

Field: TypeAlias = Callable[[Array], Array]
Probes: TypeAlias = Callable[[Key, int, tuple[int, ...]], Array]


def divergence(fn: Field, x: Float[Array, "*event"]) -> tuple[Float[Array, "*event"], Scalar]:
    """fn(x) and its exact divergence, at the cost of one Jacobian-vector product per dimension."""
    _checks.check_floating("x", x)
    x = jnp.asarray(x)
    value, pushforward = jax.linearize(_checked(fn), x)
    basis = jnp.eye(x.size, dtype=x.dtype)

    def diagonal(direction: Array, index: Array) -> Scalar:
        return jnp.ravel(pushforward(direction.reshape(x.shape)))[index]

    return value, jnp.sum(jax.vmap(diagonal)(basis, jnp.arange(x.size)))


def hutchinson_divergence(
    fn: Field, x: Float[Array, "*event"], probes: Float[Array, "k *event"]
) -> tuple[Float[Array, "*event"], Float[Array, " k"]]:
    """fn(x) and vᵀ (∂f/∂x) v for each probe v: unbiased estimates of the divergence where E[v vᵀ]
    = I.
    """
    value, products = jacobian_products(fn, x, probes)
    return value, jnp.stack([jnp.sum(v * jv) for v, jv in zip(probes, products, strict=True)])


def jacobian_products(
    fn: Field, x: Float[Array, "*event"], directions: Float[Array, "k *event"]
) -> tuple[Float[Array, "*event"], list[Float[Array, "*event"]]]:
    """fn(x) and (∂f/∂x) v for each direction v."""
    _checks.check_floating("x", x)
    x = jnp.asarray(x)
    check_directions(directions, x)
    value, pushforward = jax.linearize(_checked(fn), x)
    # A Python loop: under vmap over examples it is 2 to 3 times as fast as vmap over directions.
    return value, [pushforward(direction) for direction in directions.astype(x.dtype)]


def rademacher_probes(key: Key, num: int, shape: tuple[int, ...]) -> Float[Array, "num *shape"]:
    """`num` vectors of independent signs ±1: the least variance among independent entries."""
    _checks.check_key(key)
    _checks.check_count("num", num)
    return jax.random.rademacher(key, (num, *shape), jnp.result_type(float))


def gaussian_probes(key: Key, num: int, shape: tuple[int, ...]) -> Float[Array, "num *shape"]:
    """`num` draws of N(0, I): for few dimensions, where signs take too few values for an error
    bar.
    """
    _checks.check_key(key)
    _checks.check_count("num", num)
    return jax.random.normal(key, (num, *shape))


def sphere_probes(key: Key, num: int, shape: tuple[int, ...]) -> Float[Array, "num *shape"]:
    """`num` draws, uniform on the sphere of radius √d: E[v vᵀ] = I, as on the unit sphere it is
    I/d.
    """
    normal = gaussian_probes(key, num, shape)
    mean_square = jnp.mean(normal**2, axis=range(1, normal.ndim), keepdims=True)
    return normal / jnp.sqrt(mean_square)


def check_directions(probes: Array, x: Array) -> None:
    """`probes` holds at least one vector like x."""
    fix = f"The leading axis counts the probes; got {jnp.shape(probes)} for x of shape {x.shape}."
    _checks.check_shape("probes", jnp.shape(probes)[1:], x.shape, fix)
    _checks.check_count("len(probes)", jnp.shape(probes)[0] if jnp.ndim(probes) else 0)
    _checks.check_data("probes", jnp.asarray(probes, x.dtype))


def check_probes(probes: Array, x: Array) -> None:
    """`probes` are directions, and where their values are known not unit vectors."""
    check_directions(probes, x)
    if not _checks.is_concrete(probes) or x.size == 1:
        return  # in one dimension unit vectors are right
    norms = np.linalg.norm(np.asarray(probes).reshape(len(probes), -1), axis=1)
    if np.all(np.abs(norms - 1.0) < 1e-6):
        raise _checks.ArgumentError(
            f"`probes` must have E[v vᵀ] = I; all {len(norms)} have norm 1, for which it is I/d. "
            "Multiply them by √d, as sphere_probes does."
        )


def check_law(name: str, probes: Probes, shape: tuple[int, ...]) -> None:
    """`probes(key, num, shape)` has E‖v‖² = d, to the precision of a few thousand draws made while
    tracing.
    """
    size = max(int(np.prod(shape)), 1)
    num = -(-4096 // size)
    with jax.ensure_compile_time_eval():
        draws = probes(jax.random.key(0), num, shape)
        fix = "It takes (key, num, shape) and returns an array of shape (num, *shape)."
        _checks.check_shape(name, jnp.shape(draws), (num, *shape), fix)
        mean_square = jnp.mean(draws**2)
    if _checks.is_concrete(mean_square) and abs(float(mean_square) - 1.0) > 0.25:
        raise _checks.ArgumentError(
            f"`{name}` must draw v with E[v vᵀ] = I, hence E‖v‖² = d = {size}; got E‖v‖² ≈ "
            f"{size * float(mean_square):.3g}. Unit vectors must be multiplied by √d, as "
            "sphere_probes does."
        )


def _checked(fn: Field) -> Field:
    return lambda x: _checks.call(fn, x, name="fn")
