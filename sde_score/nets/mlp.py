"""A residual multilayer perceptron conditioned on time, for vectors and small images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar
from sde_score.nets.embedding import fourier_embedding, geometric_frequencies


class MLP(nn.Module):
    """A residual MLP (x: [*event], t: []) -> [*event] on one example, of any event shape.

    Each of `depth` blocks adds Dense(swish(Dense(h) + Dense(embedding of t))) to a stream of
    `width` features that is linear in x, so that far from the data the output grows linearly.
    `dropout` acts where a key is given as third argument (in training, through a loss's
    `context`), never without one. Parameters are float32, computed in `dtype`.
    """

    width: int = 128
    depth: int = 3
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    def __post_init__(self) -> None:
        _checks.check_count("width", self.width)
        _checks.check_count("depth", self.depth)
        if not 0.0 <= self.dropout < 1.0:
            raise _checks.ArgumentError(
                f"`dropout` must be at least 0 and below 1; got {self.dropout}. It is the "
                "fraction of features left out."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*event"], t: Scalar, dropout_key: Key | None = None
    ) -> Float[Array, "*event"]:
        _checks.check_floating("x", x)
        x = jnp.asarray(x)
        _checks.check_shape("t", jnp.shape(t), (), "One example has one time: jax.vmap over both.")
        check_dropout_key(dropout_key)
        dense = lambda features, **kwargs: nn.Dense(features, dtype=self.dtype, **kwargs)  # noqa: E731
        features = fourier_embedding(t, geometric_frequencies(16, 0.05, 10.0)).astype(x.dtype)
        embedding = nn.swish(dense(self.width, name="embed")(features))
        h = dense(self.width, name="input")(x.reshape(-1))
        for i in range(self.depth):
            hidden = dense(self.width, name=f"in_{i}")(h) + dense(self.width, name=f"time_{i}")(
                embedding
            )
            hidden = nn.swish(hidden)
            if self.dropout and dropout_key is not None:
                hidden = _dropout(jax.random.fold_in(dropout_key, i), hidden, self.dropout)
            h = h + dense(self.width, name=f"out_{i}")(hidden)
        out = dense(x.size, kernel_init=nn.initializers.zeros, name="output")(h)
        return out.reshape(x.shape).astype(x.dtype)


def check_dropout_key(key: Any) -> None:
    """`key`, where it is given, is one: a network of (x, t) may have been given a context."""
    if key is not None and not _checks.is_key(key):
        raise _checks.ArgumentError(
            f"`dropout_key` must be a typed key; got {_checks.describe(key)}. This network takes "
            "no other context: for labels or vectors wrap it in nets.Conditional."
        )


def _dropout(key: Key, x: Array, rate: float) -> Array:
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
