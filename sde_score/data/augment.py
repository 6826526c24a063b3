"""Augmentations of one image, inside the training step: `jax.vmap` over keys and images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sde_score import _checks
from sde_score._typing import Key

Image = Shaped[Array, "height width channels"]


def random_flip(key: Key, image: Image) -> Image:
    """The image or its mirror image, left to right, each with probability ½."""
    _checks.check_key(key)
    _check_image(image)
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_crop(key: Key, image: Image, size: int) -> Image:
    """A window of `size` × `size` pixels, uniform over its places in the image."""
    _checks.check_key(key)
    _check_image(image)
    _checks.check_count("size", size)
    height, width, channels = image.shape
    if size > min(height, width):
        raise _checks.ArgumentError(
            f"`size` must be at most the image's sides; got {size} for {height} × {width}. Pad "
            "the image first."
        )
    limits = jnp.array([height - size + 1, width - size + 1])
    top, left = jax.random.randint(key, (2,), 0, limits)
    return jax.lax.dynamic_slice(image, (top, left, 0), (size, size, channels))


def _check_image(image: Image) -> None:
    if jnp.ndim(image) != 3:
        raise _checks.ArgumentError(
            f"`image` must be of shape [height, width, channels]; got {jnp.shape(image)}. For "
            "several, jax.vmap over keys and images."
        )
