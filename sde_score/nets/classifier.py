"""A classifier of noised data, and a conditional network out of an unconditional one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar
from sde_score.nets.embedding import fourier_embedding, geometric_frequencies


class Classifier(nn.Module):
    """An MLP (x: [*event], t: []) -> logits [num_classes] on one example, of any event shape."""

    num_classes: int
    width: int = 128
    depth: int = 2

    @nn.compact
    def __call__(self, x: Float[Array, "*event"], t: Scalar) -> Float[Array, " num_classes"]:
        _checks.check_floating("x", x)
        x = jnp.asarray(x)
        _checks.check_shape("t", jnp.shape(t), (), "One example has one time: jax.vmap over both.")
        features = fourier_embedding(t, geometric_frequencies(16, 0.05, 10.0)).astype(x.dtype)
        h = jnp.concatenate([x.reshape(-1), features])
        for _ in range(self.depth):
            h = nn.swish(nn.Dense(self.width)(h))
        return nn.Dense(self.num_classes)(h)


class Conditional(nn.Module):
    """A network (x, t, context) -> [*event] out of `net`, one of (x, t) for any event, such as
    MLP: it takes x and the context as one vector, of whose image the first entries are kept.

    The context is a vector, or, with `num_classes`, a label: 0 to num_classes − 1, or num_classes
    for none, the `null` of classifier-free guidance.
    """

    net: nn.Module
    num_classes: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*event"], t: Scalar, context: Any = None
    ) -> Float[Array, "*event"]:
        if context is None:
            raise _checks.ArgumentError(
                "`context` is missing: this network is conditional, net(x, t, context). Bind one "
                "with sde_score.condition(score_fn, context), or guide with classifier_free."
            )
        x, fix = jnp.asarray(x), "jax.vmap over a batch."
        if self.num_classes is not None:
            _checks.check_shape("context", jnp.shape(context), (), f"It is one label: {fix}")
            whole = jnp.issubdtype(jnp.result_type(context), jnp.integer)
            inside = not _checks.is_concrete(context) or 0 <= context <= self.num_classes
            if not (whole and inside):
                raise _checks.ArgumentError(
                    f"`context` must be a label, 0 to {self.num_classes - 1}, or "
                    f"{self.num_classes} for none; got {context}."
                )
            label = jnp.asarray(context)
            known = (label >= 0) & (label <= self.num_classes)  # nan, where it is found too late
            context = jnp.where(known, jax.nn.one_hot(label, self.num_classes + 1), jnp.nan)
        _checks.check_shape(
            "context", jnp.shape(context), (jnp.size(context),), f"A vector: {fix}"
        )
        joined = jnp.concatenate([x.reshape(-1), jnp.asarray(context, x.dtype)])
        return self.net(joined, t)[: x.size].reshape(x.shape)
