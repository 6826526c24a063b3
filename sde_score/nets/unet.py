"""One U-Net on one image that is, by its fields, DDPM, DDPM++ or NCSN++.

The networks of Ho et al. (2020, arXiv 2006.11239) and Song et al. (2021, arXiv 2011.13456,
appendix H) as published in PyTorch: the same parameters in the same places, so that published
weights fit. `sde_score.nets.presets` has the fields of the published models.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sde_score import _checks
from sde_score._typing import Key, Scalar
from sde_score.nets.blocks import AttentionBlock, Layers, Resample, ResidualBlock
from sde_score.nets.embedding import fourier_embedding
from sde_score.nets.mlp import check_dropout_key
from sde_score.nets.resample import Image, downsample, upsample


class Context(NamedTuple):
    """What a U-Net takes beside image and time: a key that switches dropout on, a class label.

    As a loss's `context`, its arrays have a leading batch axis.
    """

    dropout_key: Key | None = None
    label: Int[Array, ""] | None = None


class UNet(nn.Module):
    """(x: [H, W, channels], time_input: [], context) -> [H, W, channels] on one image.

    H and W, which may differ, are multiples of 2^(len(multipliers) − 1). Level i has
    width · multipliers[i] channels and, if in `attention_levels`, attention: the published
    resolution r is that of level log2(image size/r).

    `time_input` is what the published network gets: with the positional embedding a number of
    order 0 to 1000 (999 t for VP and sub-VP), with the Fourier embedding sigma > 0, whose
    logarithm is embedded and by which `scale_by_sigma` divides the output. The Fourier frequencies
    are constants: a collection of their own beside "params". `recentre` maps data in [0, 1] to
    [−1, 1]. `context` is a `Context` or, as for `MLP`, a dropout key.

    `groups` None means min(channels/4, 32); `fir_kernel` None nearest neighbours and averages;
    `attention_head_dim` None a single head. `biggan` blocks resample inside. With `remat` each
    residual block is computed again in the backward pass. Parameters are float32, computed in
    `dtype`, the norms' statistics and the softmax in float32. `fused_attention` takes cuDNN's
    kernel on a GPU where `dtype` is of half precision and the heads have at most 256 channels (128
    before Hopper), a multiple of 8, else XLA's as always: that kernel has gradients but no forward
    mode, which likelihoods by `jax.jvp` need.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attention_levels: tuple[int, ...] = (1,)
    channels: int = 3
    dropout: float = 0.0
    num_classes: int | None = None
    embedding: Literal["positional", "fourier"] = "positional"
    fourier_scale: float = 16.0
    embedding_shift: float = 1.0
    cosine_first: bool = False
    scale_by_sigma: bool = False
    recentre: bool = False
    biggan: bool = True
    skip_rescale: bool = True
    fir_kernel: tuple[float, ...] | None = None
    resample_with_conv: bool = True
    symmetric_padding: bool = False
    progressive_input: Literal["none", "input_skip", "residual"] = "none"
    progressive_output: Literal["none", "output_skip", "residual"] = "none"
    combine: Literal["sum", "cat"] = "sum"
    init_scale: float = 0.0
    groups: int | None = None
    norm_epsilon: float = 1e-6
    attention_head_dim: int | None = None
    attention_after_every_block: bool = False
    activation: Callable[[Array], Array] = nn.swish
    dtype: Any = None
    remat: bool = False
    fused_attention: bool = False

    def __post_init__(self) -> None:
        _checks.check_count("width", self.width, 4)
        _checks.check_count("num_blocks", self.num_blocks)
        _checks.check_count("channels", self.channels)
        _checks.check_count("len(multipliers)", len(self.multipliers))
        for i, multiplier in enumerate(self.multipliers):
            _checks.check_count(f"multipliers[{i}]", multiplier)
        for name in ("groups", "attention_head_dim", "num_classes"):
            if (value := getattr(self, name)) is not None:
                _checks.check_count(name, value)
        if self.fir_kernel is not None:
            _checks.check_count("len(fir_kernel)", len(self.fir_kernel))
        for name, value, allowed in (
            ("embedding", self.embedding, ("positional", "fourier")),
            ("progressive_input", self.progressive_input, ("none", "input_skip", "residual")),
            ("progressive_output", self.progressive_output, ("none", "output_skip", "residual")),
            ("combine", self.combine, ("sum", "cat")),
        ):
            if value not in allowed:
                raise _checks.ArgumentError(f"`{name}` must be one of {allowed}; got {value!r}.")
        if self.scale_by_sigma and self.embedding != "fourier":
            raise _checks.ArgumentError(
                "`scale_by_sigma` must be False with a positional embedding, which is not given "
                "sigma. Divide the output outside of the network."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise _checks.ArgumentError(
                f"`dropout` must be at least 0 and below 1; got {self.dropout}. It is the "
                "fraction of features left out."
            )
        if not set(self.attention_levels) <= set(range(len(self.multipliers))):
            raise _checks.ArgumentError(
                f"`attention_levels` must be levels from 0 to {len(self.multipliers) - 1}; got "
                f"{self.attention_levels}. Level i has the image size divided by 2^i."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Image, time_input: Scalar, context: Context | Key | None = None
    ) -> Image:
        if not isinstance(context, Context):
            context = Context(dropout_key=context)
        self._check(x, time_input, context)
        x, time = jnp.asarray(x), _checks.at_least_float32(time_input)
        embedding = self._embed(time, context.label).astype(x.dtype)
        count = itertools.count()

        def block(name: str, h: Image, features: int, resample: Callable | None = None) -> Image:
            make = nn.remat(ResidualBlock) if self.remat else ResidualBlock
            key = context.dropout_key
            key = None if key is None else jax.random.fold_in(key, next(count))
            made = make(self._layers(), features, self.dropout, resample, name=name)
            return made(h, embedding, key)

        h, skips = self._down(block, 2.0 * x - 1.0 if self.recentre else x)
        features = h.shape[-1]
        h = block("mid_block_0", h, features)
        h = block("mid_block_1", self._attend("mid_attention", h), features)
        out = self._up(block, h, skips).astype(x.dtype)
        return out / time.astype(x.dtype) if self.scale_by_sigma else out

    def _down(self, block: Callable, x: Image) -> tuple[Image, list[Image]]:
        """The features at the lowest resolution, and those that the way up takes over."""
        h = self._layers().conv(self.width, "input")(x)
        skips, pyramid, last = [h], x, len(self.multipliers) - 1
        for i, multiplier in enumerate(self.multipliers):
            for j in range(self.num_blocks):
                h = block(f"down_{i}_block_{j}", h, self.width * multiplier)
                if i in self.attention_levels:
                    h = self._attend(f"down_{i}_attention_{j}", h)
                skips.append(h)
            if i < last:
                h = self._resample(block, f"down_{i}_resample", h, up=False)
                pyramid, h = self._join_input(f"down_{i}_pyramid", pyramid, h)
                skips.append(h)
        return h, skips

    def _up(self, block: Callable, h: Image, skips: list[Image]) -> Image:
        pyramid: Any = None
        for i, multiplier in reversed(list(enumerate(self.multipliers))):
            for j in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(f"up_{i}_block_{j}", h, self.width * multiplier)
                attends = self.attention_after_every_block or j == self.num_blocks
                if i in self.attention_levels and attends:
                    h = self._attend(f"up_{i}_attention_{j}", h)
            pyramid, h = self._join_output(f"up_{i}_pyramid", pyramid, h)
            if i > 0:
                h = self._resample(block, f"up_{i}_resample", h, up=True)
        if self.progressive_output == "output_skip":
            return pyramid
        return self._head("output", h, self.channels, self.init_scale)

    def _join_input(self, name: str, pyramid: Image, h: Image) -> tuple[Image, Image]:
        """The image at half its resolution, and `h` with it."""
        layers = self._layers()
        if self.progressive_input == "input_skip":
            pyramid = self._pyramid(f"{name}_resample", pyramid, None, up=False)
            joined = layers.dense(h.shape[-1], f"{name}_combine")(pyramid)
            both = jnp.concatenate([joined, h], axis=-1) if self.combine == "cat" else joined + h
            return pyramid, both
        if self.progressive_input == "residual":
            pyramid = self._pyramid(f"{name}_resample", pyramid, h.shape[-1], up=False)
            h = pyramid = layers.join(pyramid, h)
        return pyramid, h

    def _join_output(self, name: str, pyramid: Image | None, h: Image) -> tuple[Any, Image]:
        """The output so far at this resolution, and `h`."""
        if self.progressive_output == "output_skip":
            new = self._head(name, h, self.channels, self.init_scale)
            if pyramid is None:
                return new, h
            return self._pyramid(f"{name}_resample", pyramid, None, up=True) + new, h
        if self.progressive_output == "residual":
            if pyramid is None:
                return self._head(name, h, h.shape[-1], 1.0), h
            pyramid = self._pyramid(f"{name}_resample", pyramid, h.shape[-1], up=True)
            h = pyramid = self._layers().join(pyramid, h)
        return pyramid, h

    def _resample(self, block: Callable, name: str, h: Image, *, up: bool) -> Image:
        features = h.shape[-1]
        if self.biggan:
            resample = partial(upsample if up else downsample, kernel=self.fir_kernel)
            return block(name, h, features, resample)
        return self._pyramid(name, h, features if self.resample_with_conv else None, up=up)

    def _pyramid(self, name: str, x: Image, features: int | None, *, up: bool) -> Image:
        layers, kernel = self._layers(), self.fir_kernel
        return Resample(layers, up, features, kernel, self.symmetric_padding, name=name)(x)

    def _head(self, name: str, h: Image, features: int, scale: float) -> Image:
        layers = self._layers()
        h = layers.activation(layers.norm(h.shape[-1], f"{name}_norm")(h))
        return layers.conv(features, name, scale)(h)

    def _attend(self, name: str, h: Image) -> Image:
        layers, head_dim = self._layers(), self.attention_head_dim
        return AttentionBlock(layers, head_dim, self.fused_attention, name=name)(h)

    def _embed(self, time: Scalar, label: Array | None) -> Array:
        layers = self._layers()
        if self.embedding == "fourier":
            draw = lambda: (
                self.fourier_scale
                * jax.random.normal(  # noqa: E731
                    self.make_rng("params"), (self.width,), jnp.float32
                )
            )
            frequencies = self.variable("constants", "frequencies", draw).value
            features = fourier_embedding(jnp.log(time), frequencies)
        else:
            features = self._positional(time)
        hidden = layers.dense(4 * self.width, "embed_0")(features)
        embedding = layers.dense(4 * self.width, "embed_1")(layers.activation(hidden))
        if self.num_classes is None or label is None:
            return embedding
        embedded = nn.Embed(self.num_classes, 4 * self.width, name="label")(label)
        inside = (label >= 0) & (label < self.num_classes)  # nan, where it is not known to be
        return embedding + jnp.where(inside, embedded, jnp.nan)

    def _positional(self, time: Scalar) -> Float[Array, " width"]:
        """[sin, cos] of time · 10000^(−i/(n − shift)), n = width/2 (Vaswani et al. 2017)."""
        half = self.width // 2
        steps = jnp.arange(half, dtype=time.dtype) / (half - self.embedding_shift)
        angles = time * 10_000.0**-steps
        parts = [jnp.sin(angles), jnp.cos(angles)]
        return jnp.pad(
            jnp.concatenate(parts[::-1] if self.cosine_first else parts), (0, self.width % 2)
        )

    def _layers(self) -> Layers:
        return Layers(
            self.groups,
            self.norm_epsilon,
            self.activation,
            self.init_scale,
            1.0 if self.biggan else 0.1,  # of the shortcuts
            self.skip_rescale,
            self.dtype,
        )

    def _check(self, x: Any, time_input: Any, context: Context) -> None:
        _checks.check_floating("x", x)
        shape, multiple = jnp.shape(x), 2 ** (len(self.multipliers) - 1)
        if len(shape) != 3 or any(n % multiple or not n for n in shape[:2]):
            raise _checks.ArgumentError(
                f"`x` must be one image (H, W, C), H and W positive multiples of {multiple}; got "
                f"shape {shape}. For a batch, jax.vmap; else pad, resize or take fewer levels."
            )
        if shape[2] != self.channels:
            raise _checks.ArgumentError(
                f"`x` must have {self.channels} channels, the last axis; got shape {shape}. Set "
                "`channels`, or move the axis with jnp.moveaxis."
            )
        fix = "One example has one time: jax.vmap over both."
        _checks.check_shape("time_input", jnp.shape(time_input), (), fix)
        check_dropout_key(context.dropout_key)
        _check_label(context.label, self.num_classes)


def _check_label(label: Any, num_classes: int | None) -> None:
    if label is None and num_classes is None:
        return
    if label is None or num_classes is None:
        raise _checks.ArgumentError(
            f"`context.label` must be given exactly where `num_classes` is; got {label} with "
            f"num_classes={num_classes}. Pass Context(label=...) as third argument."
        )
    _checks.check_shape("context.label", jnp.shape(label), (), "One example has one label.")
    if not jnp.issubdtype(jnp.result_type(label), jnp.integer) or (
        _checks.is_concrete(label) and not 0 <= int(label) < num_classes
    ):
        raise _checks.ArgumentError(
            f"`context.label` must be an integer from 0 to {num_classes - 1}; got "
            f"{_checks.describe(label)}. Number the classes from 0."
        )
