"""Data that come inside ordinary packages: nothing is downloaded."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

_SEED, _NUM_TRAIN = 0, 1500


class Examples(NamedTuple):
    """Integer images and their labels: a pytree, so `batches` takes it as it is."""

    images: UInt8[Array, "n height width channels"]
    labels: Int32[Array, " n"]


class Split(NamedTuple):
    """The two parts of a data set."""

    train: Examples
    test: Examples


def digits() -> Split:
    """scikit-learn's handwritten digits: `train, test = digits()` with 1500 and 297 examples.

    Images are uint8 [n, 8, 8, 1] with the 17 values 0 … 16, labels int32 0 … 9. The split is
    fixed: the first 1500 entries of `numpy.random.default_rng(0).permutation(1797)` train.
    (Alpaydin & Kaynak 1998, "Optical recognition of handwritten digits", UCI: its test set.)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "`digits` needs scikit-learn; install it with: pip install 'sde_score[experiments]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SEED).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 8, 8, 1), jnp.uint8)
    labels = jnp.asarray(labels[order], jnp.int32)
    return Split(
        train=Examples(images[:_NUM_TRAIN], labels[:_NUM_TRAIN]),
        test=Examples(images[_NUM_TRAIN:], labels[_NUM_TRAIN:]),
    )
