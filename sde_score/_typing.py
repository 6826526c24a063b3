"""The vocabulary of the library, said once."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jaxtyping
from jax.tree_util import Partial
from jaxtyping import Array, Float, Shaped

Key: TypeAlias = jaxtyping.Key[Array, ""]
Scalar: TypeAlias = Any  # Float[Array, ""] or a Python number: what jnp takes for a scalar
Params: TypeAlias = Any  # any pytree of arrays: the library never looks inside

ScoreFn: TypeAlias = Callable[..., Float[Array, "*event"]]
"""`(x: [*event], t: []) -> [*event]`, on one example; a loss with `context` passes a third
argument.
"""


@runtime_checkable
class SDE(Protocol):
    """Linear SDE dx = f(x, t) dt + g(t) dw on [t0, t1] with p(x_t | x_0) = N(alpha(t) x_0,
    sigma(t)² I).

    Write your own as a frozen dataclass under `sde_score.register_pytree`. It
    must satisfy f/x = d log alpha/dt and g² = d sigma²/dt − 2 (d log alpha/dt) sigma²; its prior
    is N(0, sigma(t1)² I).
    """

    @property
    def t0(self) -> Any: ...  # a Python number, or a tracer when the SDE travels through jit

    @property
    def t1(self) -> Any: ...

    def alpha(self, t: Scalar) -> Scalar: ...

    def sigma(self, t: Scalar) -> Scalar: ...

    def drift(self, x: Float[Array, "*event"], t: Scalar) -> Float[Array, "*event"]: ...

    def diffusion(self, t: Scalar) -> Scalar: ...


Step: TypeAlias = Callable[[Key, ScoreFn, SDE, Shaped[Array, "*event"], Scalar, Scalar], Array]
"""`(key, score_fn, sde, x_t, t, s) -> x_s` with s < t: one step of a sampler."""


def travelling(fn: Any) -> Any:
    """`fn` as a pytree, so that it passes through `jit` as an argument; what already is one stays
    as it is.
    """
    return Partial(fn) if callable(fn) and jax.tree_util.all_leaves([fn]) else fn


def bind(fn: Callable, *args: Any) -> Partial:
    """`fn` with its first arguments bound, as a pytree: new arrays in `args` never recompile."""
    return Partial(fn, *(travelling(arg) for arg in args))


def register_pytree(cls: type) -> type:
    """Class decorator: make a frozen dataclass a pytree; its fields, all data, are the children.

    `jax.tree_util.register_dataclass` does as much, but to jaxlib (seen in 0.10.2 and 0.12.0) two
    such classes with equally many fields have equal structures, so that a cache of `jit` can run
    the program of one for the other.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten(instance: Any) -> tuple[tuple, None]:
        return tuple(getattr(instance, name) for name in names), None

    def flatten_with_keys(instance: Any) -> tuple[tuple, None]:
        return tuple(zip(keys, flatten(instance)[0], strict=True)), None

    def unflatten(_: None, children: Iterable) -> Any:
        instance = object.__new__(cls)  # no __post_init__: a gradient need not be a valid instance
        for name, child in zip(names, children, strict=True):
            object.__setattr__(instance, name, child)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
