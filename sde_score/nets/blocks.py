"""The blocks of a U-Net: residual, attention, resampling by a convolution."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import Key
from sde_score.nets.mlp import _dropout
from sde_score.nets.resample import Image, blur, downsample, upsample


def _init(scale: float = 1.0) -> Callable:
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


class Layers(NamedTuple):
    """What all blocks of one network share."""

    groups: int | None
    epsilon: float
    activation: Callable[[Array], Array]
    init_scale: float
    shortcut_scale: float
    skip_rescale: bool
    dtype: Any  # whatever jnp takes for a dtype

    def norm(self, channels: int, name: str) -> nn.GroupNorm:
        """Of one image: left alone, Linen takes the first axis for a batch."""
        groups = min(channels // 4, 32) if self.groups is None else self.groups
        if channels % max(groups, 1):
            raise _checks.ArgumentError(
                f"`groups` must divide the channels; got {groups} with {channels} channels. None "
                "means min(channels/4, 32): take widths of which that is a divisor."
            )
        axes = (-3, -2, -1)
        return nn.GroupNorm(
            groups, epsilon=self.epsilon, reduction_axes=axes, dtype=self.dtype, name=name
        )

    def conv(self, features: int, name: str, scale: float = 1.0, **options: Any) -> nn.Conv:
        return nn.Conv(
            features, (3, 3), kernel_init=_init(scale), dtype=self.dtype, name=name, **options
        )

    def dense(self, features: int, name: str, scale: float = 1.0) -> nn.Dense:
        return nn.Dense(features, kernel_init=_init(scale), dtype=self.dtype, name=name)

    def join(self, x: Array, h: Array) -> Array:
        return (x + h) / 2**0.5 if self.skip_rescale else x + h


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + dense(act(embedding))))), both terms resampled first
    where `resample` is given (BigGAN).
    """

    layers: Layers
    features: int
    dropout: float
    resample: Callable[[Image], Image] | None = None

    @nn.compact
    def __call__(self, x: Image, embedding: Array, dropout_key: Key | None) -> Image:
        layers = self.layers
        h = layers.activation(layers.norm(x.shape[-1], "norm_0")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = layers.conv(self.features, "conv_0")(h)
        time = layers.dense(self.features, "time")(layers.activation(embedding))
        h = layers.activation(layers.norm(self.features, "norm_1")(h + time[None, None]))
        if self.dropout and dropout_key is not None:
            h = _dropout(dropout_key, h, self.dropout)
        h = layers.conv(self.features, "conv_1", layers.init_scale)(h)
        if self.resample is not None or x.shape[-1] != self.features:
            x = layers.dense(self.features, "shortcut", layers.shortcut_scale)(x)
        return layers.join(x, h)


class AttentionBlock(nn.Module):
    """x + dense(attention(norm(x))) over all pixels, in heads of `head_dim` channels; `fused` as
    in `UNet`.
    """

    layers: Layers
    head_dim: int | None
    fused: bool = False

    @nn.compact
    def __call__(self, x: Image) -> Image:
        layers, channels = self.layers, x.shape[-1]
        head_dim = channels if self.head_dim is None else self.head_dim
        if channels % head_dim:
            raise _checks.ArgumentError(
                f"`attention_head_dim` must divide the channels; got {head_dim} with {channels} "
                "channels. None makes a single head."
            )
        h = layers.norm(channels, "norm")(x).reshape(-1, channels)
        heads = lambda name: layers.dense(channels, name, 0.1)(h).reshape(  # noqa: E731
            len(h), -1, head_dim
        )
        query, key, value = map(heads, ("query", "key", "value"))
        fits = head_dim % 8 == 0 and head_dim <= 256 and query.dtype in (jnp.bfloat16, jnp.float16)
        fused = self.fused and fits and jax.default_backend() == "gpu"
        implementation = "cudnn" if fused else None
        h = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
        h = layers.dense(channels, "out", layers.init_scale)(h.reshape(x.shape))
        return layers.join(x, h)


class Resample(nn.Module):
    """2 × up or down, by neighbours or a FIR kernel, with a 3 × 3 convolution to `features`
    channels if that is not None.
    """

    layers: Layers
    up: bool
    features: int | None
    kernel: tuple[float, ...] | None
    symmetric: bool

    @nn.compact
    def __call__(self, x: Image) -> Image:
        if self.features is None:
            return (upsample if self.up else downsample)(x, self.kernel)
        conv = partial(self.layers.conv, self.features, "conv")
        if self.kernel is not None and self.up:
            return conv(padding="VALID")(upsample(x, self.kernel, margin=1))
        if self.kernel is not None:
            return conv(padding="VALID", strides=2)(blur(x, self.kernel, margin=1))
        if self.up:
            return conv()(upsample(x))
        return conv(padding=[(int(self.symmetric), 1)] * 2, strides=2)(x)
