"""FFJORD's network: a vector field whose layers are gated and shifted by the time."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar


class ConcatSquash(nn.Module):
    """A field (x: [*event], t: []) -> [*event] on one example, of any event shape.

    `depth` layers of `width` features and one like x, each (W h + b) sigmoid(w t + c) + v t with
    `activation` between them (Grathwohl et al. 2018, arXiv 1810.01367, and its published code).
    The last W and v start at zero: the flow, at the identity. t should be of order 1. Parameters
    are float32, computed in `dtype`.
    """

    width: int = 64
    depth: int = 3
    activation: Callable[[Array], Array] = nn.tanh
    dtype: jnp.dtype | None = None

    def __post_init__(self) -> None:
        _checks.check_count("width", self.width)
        _checks.check_count("depth", self.depth)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*event"], t: Scalar) -> Float[Array, "*event"]:
        _checks.check_floating("x", x)
        x = jnp.asarray(x)
        _checks.check_shape("t", jnp.shape(t), (), "One example has one time: jax.vmap over both.")
        time, h = jnp.asarray(t, x.dtype)[None], x.reshape(-1)
        for i, features in enumerate((*[self.width] * self.depth, x.size)):
            init = nn.initializers.lecun_normal() if i < self.depth else nn.initializers.zeros
            dense = partial(nn.Dense, features, dtype=self.dtype)
            gate = nn.sigmoid(dense(name=f"gate_{i}")(time))
            shift = dense(name=f"shift_{i}", use_bias=False, kernel_init=init)(time)
            h = self.activation(h) if i else h
            h = dense(name=f"layer_{i}", kernel_init=init)(h) * gate + shift
        return h.reshape(x.shape).astype(x.dtype)
