"""Images at twice or half their resolution: neighbours and averages, or a separable FIR filter.

The filter is that of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958, appendix B) as NCSN++ has it
(Song et al. 2021, arXiv 2011.13456, appendix H.1): the outer product of a kernel with itself, of
sum 1, after zeros were put between the pixels (times 4) or before every second one is dropped. It
is applied by slices, one axis at a time: on a CPU an order faster than a depthwise convolution.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Image = Float[Array, "H W C"]
Kernel = Sequence[float]


def upsample(x: Image, kernel: Kernel | None = None, *, margin: int = 0) -> Image:
    """(H, W, C) -> (2H, 2W, C): each pixel four times, or `kernel` over pixels amid zeros.

    With a kernel, `margin` more pixels on each side are kept of what it makes: what a convolution
    that follows would else have to pad with zeros.
    """
    if kernel is None:
        height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, None, :, None], (height, 2, width, 2, channels))
        return x.reshape(2 * height, 2 * width, channels)
    excess = len(kernel) - 2
    taps = [2.0 * tap / sum(kernel) for tap in kernel]
    return _filter(x, taps, ((excess + 1) // 2 + 1 + margin, excess // 2 + margin), up=2)


def downsample(x: Image, kernel: Kernel | None = None) -> Image:
    """(H, W, C) -> (H/2, W/2, C): the mean of four pixels, or `kernel` at every second one."""
    if kernel is None:
        height, width, channels = x.shape
        return jnp.mean(x.reshape(height // 2, 2, width // 2, 2, channels), axis=(1, 3))
    return blur(x, kernel, stride=2)


def blur(x: Image, kernel: Kernel, *, stride: int = 1, margin: int = 0) -> Image:
    """`x` filtered by `kernel`, every `stride`-th pixel, with the padding of `downsample`."""
    excess = len(kernel) - 2
    taps = [tap / sum(kernel) for tap in kernel]
    return _filter(x, taps, ((excess + 1) // 2 + margin, excess // 2 + margin), stride=stride)


def _filter(
    x: Image, taps: Kernel, padding: tuple[int, int], *, up: int = 1, stride: int = 1
) -> Image:
    low, high = padding
    for axis in (0, 1):
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (low, high + up - 1, up - 1)  # zeros at both ends and between
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
        size = padded.shape[axis] - len(taps) + 1
        parts = [
            tap * jax.lax.slice_in_dim(padded, i, i + size, stride, axis)
            for i, tap in enumerate(reversed(taps))  # a convolution: the kernel is turned
        ]
        x = sum(parts[1:], parts[0])
    return x
