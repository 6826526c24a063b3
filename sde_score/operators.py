"""Linear operators of inverse problems: masks, projections, means of channels and blocks, blurs,
or any linear function, each with its adjoint and, where known, its singular values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar, bind, register_pytree, travelling

Event = Float[Array, "*event"]
Data = Float[Array, "*data"]


@register_pytree
@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """A linear map A of one example x [*event] to data [*data]: call it, or its `adjoint`.

    Where known, A = U diag(singular_values) Vᵀ: `rotate` is y ↦ Uᵀ y and the singular values have
    the shape of Uᵀ y, or of a scalar; then Vᵀ = diag(singular_values)⁻¹ Uᵀ A. `like` is an array
    of the event's shape, whose values are never read.
    """

    fn: Callable[[Event], Data]
    like: Event
    rotate: Callable[[Data], Array] | None = None
    singular_values: Array | None = None

    @property
    def data_shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.fn, self.like).shape

    def __call__(self, x: Event) -> Data:
        """A x."""
        x, fix = jnp.asarray(x), "The operator takes one example: jax.vmap over a batch."
        _checks.check_shape("x", x.shape, self.like.shape, fix)
        return self.fn(x.astype(jnp.result_type(x, float)))

    def adjoint(self, y: Data) -> Event:
        """Aᵀ y."""
        fix = "It is one datum, A x: jax.vmap over a batch."
        _checks.check_shape("y", jnp.shape(y), self.data_shape, fix)
        like = jax.ShapeDtypeStruct(self.like.shape, jnp.result_type(y, float))
        y = jnp.asarray(y, jax.eval_shape(self.fn, like).dtype)
        return jax.linear_transpose(self.fn, like)(y)[0]

    def log_prob(self, residual: Data, signal: Scalar, noise: Scalar) -> Scalar:
        """log N(residual; 0, signal² A Aᵀ + noise² I), in nats, where that is not singular."""
        if self.rotate is None:
            raise _checks.ArgumentError(
                "`operator` has no singular values, which this method needs. Find them, for small "
                "data, with with_singular_values(operator)."
            )
        coordinates = self.rotate(residual)
        variance = (signal * self.singular_values) ** 2 + noise**2
        seen = variance > 0
        variance = jnp.where(seen, variance, 1.0)
        terms = coordinates**2 / variance + jnp.log(2.0 * jnp.pi * variance)
        return -0.5 * jnp.sum(jnp.where(seen, terms, 0.0))


def linear_operator(fn: Callable, shape: tuple[int, ...]) -> LinearOperator:
    """Any linear function of an example of that shape, without its singular values."""
    _checks.check_event_shape(shape)
    check_linear(fn, like := jnp.zeros(shape))
    return LinearOperator(travelling(fn), like)


def with_singular_values(operator: LinearOperator) -> LinearOperator:
    """The operator with its singular values, from the dense matrix A Aᵀ of its data."""
    rows = jnp.eye(int(np.prod(operator.data_shape)), dtype=operator.like.dtype)
    gram = jax.vmap(lambda y: operator(operator.adjoint(y.reshape(operator.data_shape))))(rows)
    values, vectors = jnp.linalg.eigh(gram.reshape(rows.shape))
    singular_values = jnp.sqrt(_rounded(values))
    return dataclasses.replace(
        operator, rotate=bind(_rotate, vectors), singular_values=singular_values
    )


def mask_operator(mask: Any) -> LinearOperator:
    """x ↦ the entries where the Boolean `mask` [*event] is true, as a vector."""
    check_mask(mask)
    if not (_checks.is_concrete(mask) and np.any(mask)):
        raise _checks.ArgumentError(
            f"`mask` must be true somewhere, and known when tracing; got {_checks.describe(mask)}."
        )
    return _orthogonal(bind(_entries, jnp.asarray(np.flatnonzero(mask))), np.shape(mask), 1.0)


def random_projection(key: Key, shape: tuple[int, ...], num: int) -> LinearOperator:
    """x ↦ its coordinates along `num` random orthonormal directions."""
    _checks.check_key(key)
    _checks.check_event_shape(shape)
    _checks.check_count("num", num)
    size = int(np.prod(shape))
    if num > size:
        raise _checks.ArgumentError(f"`num` must be at most the size {size} of x; got {num}.")
    directions = jnp.linalg.qr(jax.random.normal(key, (size, num)))[0]
    return _orthogonal(bind(_rotate, directions), shape, 1.0)


def grey_operator(shape: tuple[int, ...]) -> LinearOperator:
    """x ↦ the mean of its channels, the last axis."""
    _checks.check_event_shape(shape)
    return _orthogonal(bind(_mean_of_channels), shape, shape[-1] ** -0.5)


def downsampling_operator(shape: tuple[int, ...], factor: int) -> LinearOperator:
    """x ↦ the means of its blocks, `factor` long along the first two axes, or a vector's one."""
    _checks.check_event_shape(shape)
    _checks.check_count("factor", factor)
    blocked = shape[:2]
    if any(n % factor for n in blocked):
        raise _checks.ArgumentError(
            f"`factor` must divide the first two axes of `shape`; got {factor} for {shape}."
        )
    coarse = jnp.zeros((*(n // factor for n in blocked), *shape[2:]))
    return _orthogonal(bind(_block_means, coarse), shape, factor ** (-len(blocked) / 2))


def blur_operator(shape: tuple[int, ...], kernel: Float[Array, "*k"]) -> LinearOperator:
    """Circular convolution with `kernel`, centred, along the first axes of x, as many as it has.

    A Aᵀ is diagonal under the discrete Hartley transform, which is real and orthogonal.
    """
    _checks.check_event_shape(shape)
    _checks.check_data("kernel", kernel, _checks.CONVERT)
    kernel = jnp.asarray(kernel)
    kernel = kernel.reshape(*kernel.shape, *[1] * (len(shape) - kernel.ndim))
    if kernel.ndim > len(shape) or any(k > n for k, n in zip(kernel.shape, shape, strict=True)):
        raise _checks.ArgumentError(
            f"`kernel` must fit into `shape`, {shape}; got shape {kernel.shape}."
        )
    padded = jnp.zeros(shape, kernel.dtype).at[tuple(map(slice, kernel.shape))].set(kernel)
    centred = jnp.roll(padded, [-(k // 2) for k in kernel.shape], range(len(shape)))
    transfer = jnp.fft.fftn(centred)
    fn = bind(_convolve, transfer)
    return LinearOperator(fn, jnp.zeros(shape), bind(_hartley), _rounded(jnp.abs(transfer)))


def check_linear(fn: Any, like: Event) -> None:
    """fn(0) = 0 and fn(2 x) = 2 fn(x) at some x, where fn's values are known."""
    x = jnp.cos(jnp.arange(like.size, dtype=like.dtype)).reshape(like.shape)
    try:
        zero, once, doubled = (fn(scale * x) for scale in (0.0, 1.0, 2.0))
    except Exception as error:  # whatever it fails by
        raise _checks.ArgumentError(
            f"`operator` must be a function of one example, of shape {like.shape}; it failed: "
            f"{type(error).__name__}: {error}. Of a matrix pass lambda x: matrix @ x."
        ) from error
    if _checks.is_concrete(zero, once, doubled) and not (
        np.all(np.asarray(zero) == 0) and np.allclose(doubled, 2.0 * np.asarray(once), rtol=1e-3)
    ):
        raise _checks.ArgumentError(
            "`operator` must be linear, and so take 0 to 0 and 2 x to twice the image of x. Take "
            "off y what is constant."
        )


def check_mask(mask: Any) -> None:
    """`mask` is Boolean."""
    dtype = mask.dtype if hasattr(mask, "dtype") else np.asarray(mask).dtype
    if not jnp.issubdtype(dtype, jnp.bool_):
        raise _checks.ArgumentError(
            f"`mask` must be Boolean; got {dtype}. It is true where x is "
            "observed: compare with mask > 0."
        )


def _orthogonal(fn: Callable, shape: tuple[int, ...], singular_value: float) -> LinearOperator:
    """Of an fn with A Aᵀ = singular_value² I."""
    like = jnp.zeros(shape)
    return LinearOperator(fn, like, bind(_same), jnp.asarray(singular_value, like.dtype))


def _rounded(values: Array) -> Array:
    """With 0 for what is 0 but for rounding: `log_prob` tells such directions apart."""
    least = values.size * jnp.finfo(values.dtype).eps * jnp.max(values)
    return jnp.where(values > least, values, 0.0)


def _same(y: Data) -> Data:
    return y


def _entries(index: Array, x: Event) -> Data:
    return x.reshape(-1)[index]


def _rotate(vectors: Array, y: Array) -> Array:
    return jnp.matmul(y.reshape(-1), vectors, precision=jax.lax.Precision.HIGHEST)


def _mean_of_channels(x: Event) -> Data:
    return jnp.mean(x, axis=-1)


def _block_means(coarse: Array, x: Event) -> Data:
    """`coarse` has the shape of the result."""
    for axis, num in enumerate(coarse.shape):
        blocks = x.reshape(*x.shape[:axis], num, -1, *x.shape[axis + 1 :])
        x = jnp.mean(blocks, axis=axis + 1)
    return x


def _convolve(transfer: Array, x: Event) -> Data:
    return jnp.fft.ifftn(jnp.fft.fftn(x) * transfer).real.astype(x.dtype)


def _hartley(y: Data) -> Array:
    waves = jnp.fft.fftn(y) / jnp.sqrt(y.size)
    return (waves.real - waves.imag).astype(y.dtype)
