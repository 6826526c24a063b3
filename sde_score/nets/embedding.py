"""Embeddings of a scalar (a time, a noise level) into features that a network can use."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score._typing import Scalar


def fourier_embedding(value: Scalar, frequencies: Float[Array, " n"]) -> Float[Array, " 2n"]:
    """[sin(2π f v), cos(2π f v)] (Tancik et al. 2020); the frequencies are constants, not
    parameters.
    """
    angles = 2.0 * jnp.pi * frequencies * value
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def geometric_frequencies(num: int, lowest: float, highest: float) -> Float[Array, " num"]:
    """`num` frequencies from `lowest` to `highest` in equal ratios."""
    return lowest * (highest / lowest) ** jnp.linspace(0.0, 1.0, num)
