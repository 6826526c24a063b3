"""The public boundary's argument checks: each message names the argument, its value, the rule and
the fix.

Shapes, types and counts are checked always; values only where they are concrete, never inside a
trace.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sde_score._typing import SDE, Scalar

_DEQUANTISE = (
    "Densities need continuous data: dequantise integers first, see sde_score.uniform_dequantize."
)
CONVERT = "Convert it with jnp.asarray(x, float)."


class ArgumentError(ValueError):
    """A wrong argument, found by this library."""


def is_concrete(*values: Any) -> bool:
    """Whether every array in `values` holds numbers now, rather than standing for them."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed keys."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def check_key(key: Any, name: str = "key") -> None:
    """`key` is one typed key."""
    if not is_key(key):
        raise ArgumentError(
            f"`{name}` must be a typed key; got {describe(key)}. Make one with "
            "jax.random.key(seed), "
            "or wrap a raw one with jax.random.wrap_key_data."
        )
    if key.shape:
        raise ArgumentError(
            f"`{name}` must be one key; got an array of keys of shape {key.shape}. "
            "For several examples, jax.vmap over the keys."
        )


def check_floating(name: str, x: Any, fix: str = _DEQUANTISE) -> None:
    """`x` is an array of floating-point numbers."""
    try:
        dtype = jnp.result_type(x)
    except TypeError as error:
        raise ArgumentError(
            f"`{name}` must be an array; got {type(x).__name__}. Convert it with jnp.asarray."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ArgumentError(f"`{name}` must be floating point; got {dtype}. {fix}")


def check_data(name: str, x: Any, fix: str = _DEQUANTISE) -> None:
    """Every leaf of `x` is a floating-point array, not empty and (where its values are known)
    finite.
    """
    for leaf in jax.tree.leaves(x):
        check_floating(name, leaf, fix)
        if jnp.size(leaf) == 0:
            raise ArgumentError(f"`{name}` must not be empty; got shape {jnp.shape(leaf)}.")
        # numpy, as jnp makes a tracer even of a constant that a traced function closes over
        if is_concrete(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            bad = int(np.sum(~np.isfinite(np.asarray(leaf))))
            raise ArgumentError(
                f"`{name}` must be finite; {bad} of its {jnp.size(leaf)} values are nan or "
                "infinite. "
                "Clean the data first."
            )


def check_shape(name: str, got: Any, want: Any, fix: str) -> None:
    """Two shapes are equal."""
    if tuple(got) != tuple(want):
        raise ArgumentError(f"`{name}` must have shape {tuple(want)}; got {tuple(got)}. {fix}")


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """`value` is a whole number of at least `minimum`, known when tracing."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ArgumentError(
            f"`{name}` must be a Python integer of at least {minimum}; got {describe(value)}. "
            "It is known when tracing: pass a number, not an array."
        )


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """`value` is finite and above 0 (or at least 0), where it is concrete."""
    if value is None or not is_concrete(value):
        return
    number = np.asarray(value)
    if not np.issubdtype(number.dtype, np.number):
        raise ArgumentError(f"`{name}` must be a number; got {describe(value)}. Convert it first.")
    if not (np.all(np.isfinite(number)) and np.all(number >= 0 if zero else number > 0)):
        rule = "at least 0" if zero else "above 0"
        raise ArgumentError(
            f"`{name}` must be finite and {rule}; got {describe(value)}. Check its sign and scale."
        )


def check_positive_number(name: str, value: Any, *, zero: bool = False) -> None:
    """`value` is one number, finite and above 0 (or at least 0) where it is concrete."""
    if value is None or isinstance(value, str):
        raise ArgumentError(f"`{name}` must be a number; got {value!r}.")
    check_shape(name, jnp.shape(value), (), "Give one number: jax.vmap over several.")
    check_positive(name, value, zero=zero)


def check_time(name: str, t: Any, sde: SDE) -> None:
    """`t` lies in [t0, t1], up to float32 rounding, where both are concrete."""
    if not is_concrete(t, sde.t0, sde.t1):
        return
    slack = 1e-6 * (abs(sde.t0) + abs(sde.t1) * 1e-6)
    times = np.asarray(t)
    if not (np.all(times >= sde.t0 - slack) and np.all(times <= sde.t1 * (1 + 1e-6))):
        raise ArgumentError(
            f"`{name}` must lie in [t0, t1] = [{sde.t0}, {sde.t1}] of {type(sde).__name__}; got "
            f"{describe(t)}. "
            "To go nearer to the data, lower t0 with dataclasses.replace(sde, t0=...)."
        )


def at_least_float32(x: Any) -> jax.Array:
    """`x` in its dtype, or in float32 if that is narrower: times and states need the digits."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_end(name: str, time: Any, end_name: str, end: Any, fix: str) -> None:
    """A grid's first or last time is that end of the SDE's, up to float32 rounding."""
    if is_concrete(time, end) and not np.isclose(time, end, rtol=1e-5, atol=0.0):
        raise ArgumentError(f"`{name}` must be {end_name} = {end}; got {describe(time)}. {fix}")


def check_grid(ts: Any, sde: SDE) -> None:
    """`ts` is a decreasing time grid of at least two points inside [t0, t1]."""
    if jnp.ndim(ts) != 1 or jnp.size(ts) < 2:
        raise ArgumentError(
            "`ts` must be a one-dimensional grid of at least two times; got shape "
            f"{jnp.shape(ts)}. "
            "Make one with uniform_grid(sde, num_steps)."
        )
    # In the dtype that jnp gives them: float64 times may coincide in float32.
    if is_concrete(ts) and not np.all(np.diff(np.asarray(ts, jnp.result_type(float, ts))) < 0):
        raise ArgumentError(
            f"`ts` must decrease, from t1 towards t0; got {describe(ts)}. Reverse or sort the "
            "grid."
        )
    check_time("ts", ts, sde)


def call(fn: Callable, x: jax.Array, *args: Any, name: str = "score_fn") -> jax.Array:
    """`fn(x, *args)`, which must return an array of the shape of `x`, in the dtype of `x`."""
    fix = (
        f"`{name}` takes one example, x of shape {x.shape}, and a scalar t: "
        "wrap a batched network with `lambda x, t: net(x[None], t[None])[0]`, and jax.vmap over a "
        "batch."
        if args
        else f"`{name}` takes one example, x of shape {x.shape}, and over an SDE a time: "
        "wrap a batched network with `lambda x, t: net(x[None], t[None])[0]`, and one with time, "
        "where none is passed, with `lambda x: net(x, t)`."
    )
    if len(args) == 1:
        fix += f" Give a conditional one its context by sde_score.condition({name}, context)."
    try:
        out = fn(x, *args)
    except (ArgumentError, jax.errors.KeyReuseError):
        raise
    except Exception as error:  # whatever error the network's framework has
        raise ArgumentError(
            f"`{name}` failed on one example: {type(error).__name__}: {error}\n{fix}"
        ) from error
    if jnp.shape(out) != x.shape:
        raise ArgumentError(
            f"`{name}` must return the shape of `x`; got {jnp.shape(out)} for x of shape "
            f"{x.shape}. {fix}"
        )
    return jnp.asarray(out, x.dtype)


def check_scalar_time(t: Any, sde: SDE) -> None:
    """`t` is one time, in [t0, t1] where it is concrete."""
    check_shape(
        "t", jnp.shape(t), (), "One example has one time: jax.vmap over examples and times."
    )
    check_time("t", t, sde)


def check_event_shape(shape: Any) -> None:
    """`shape` is that of one example."""
    if not (isinstance(shape, tuple) and all(isinstance(n, int) and n > 0 for n in shape)):
        raise ArgumentError(
            f"`shape` must be a tuple of positive integers, that of one example; got {shape!r}. "
            "For several samples, jax.vmap over keys."
        )


def check_sde(sde: Any) -> None:
    """`sde` has the six members of the protocol."""
    if isinstance(sde, type) or not isinstance(sde, SDE):
        raise ArgumentError(
            f"`sde` must be an SDE with t0, t1, alpha, sigma, drift and diffusion; got {sde!r}. "
            "Pass an instance such as VP()."
        )
    if jax.tree_util.all_leaves([sde]):
        raise ArgumentError(
            f"`sde` must be a pytree; got {sde!r}. Decorate its frozen dataclass with "
            "sde_score.register_pytree."
        )


def apply(name: str, fn: Any, *args: Any) -> Any:
    """fn(*args), where a wrong signature is the caller's mistake in the argument `name`."""
    try:
        return fn(*args)
    except TypeError as error:
        raise ArgumentError(
            f"`{name}` cannot be called as it must: {error}. Pass the function itself, and what "
            "makes one called: uniform_times, but lognormal_times(); noise_weight, but "
            "min_snr_weight()."
        ) from error


def check_scalar(name: str, value: Any, source: str) -> Scalar:
    """`value` is a scalar; returned for use in an expression."""
    if jnp.shape(value) != ():
        raise ArgumentError(
            f"`{name}` must return a scalar; got shape {jnp.shape(value)} from {source}."
        )
    return value


def describe(value: Any) -> str:
    """A short form of any value for an error message."""
    shape = getattr(value, "shape", None)
    if shape is None or shape == ():
        return f"{value!r}" if isinstance(value, int | float | str) else f"{value}"
    head = f"{value.dtype}[{','.join(map(str, shape))}]"
    if not is_concrete(value) or not np.issubdtype(value.dtype, np.number):
        return head
    numbers = np.asarray(value)
    return f"{head} from {np.min(numbers):.6g} to {np.max(numbers):.6g}"
