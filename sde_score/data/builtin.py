"""Data that come inside ordinary packages: nothing is downloaded."""

import importlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from sde_score import _checks

_SEED, _NUM_TRAIN = 0, 1500
_SIZE, _BAND = 32, 160  # of a patch; of the columns of which the last _SIZE test


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
    images, labels = _sklearn_datasets("digits").load_digits(return_X_y=True)
    order = np.random.default_rng(_SEED).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 8, 8, 1), jnp.uint8)
    labels = jnp.asarray(labels[order], jnp.int32)
    return Split(
        train=Examples(images[:_NUM_TRAIN], labels[:_NUM_TRAIN]),
        test=Examples(images[_NUM_TRAIN:], labels[_NUM_TRAIN:]),
    )


def patches(*, stride: int = 6) -> Split:
    """Natural images, 32 × 32, cut from scikit-learn's two photographs of 427 × 640 pixels.

    Images are uint8 [n, 32, 32, 3], labels int32: the photograph's number. In each band of 160
    columns the last 32 test, so no pixel is in both parts: 104 disjoint test patches, and 8976
    that overlap, every `stride` pixels either way, train. (china.jpg and flower.jpg, CC BY 2.0.)
    """
    _checks.check_count("stride", stride)
    photographs = _sklearn_datasets("patches").load_sample_images().images

    def cut(columns: list[int], step: int) -> Examples:
        """The patches with these left columns, every `step` rows."""
        windows = [
            np.lib.stride_tricks.sliding_window_view(photograph, (_SIZE, _SIZE), axis=(0, 1))
            for photograph in photographs
        ]
        images = np.stack([w[::step][:, columns] for w in windows]).transpose(0, 1, 2, 4, 5, 3)
        labels = np.repeat(np.arange(len(images)), images.shape[1] * images.shape[2])
        flat = images.reshape(-1, _SIZE, _SIZE, 3)
        return Examples(jnp.asarray(flat, jnp.uint8), jnp.asarray(labels, jnp.int32))

    bands = range(0, photographs[0].shape[1], _BAND)
    train = [c for band in bands for c in range(band, band + _BAND - 2 * _SIZE + 1, stride)]
    return Split(cut(train, stride), cut([band + _BAND - _SIZE for band in bands], _SIZE))


def _sklearn_datasets(wanted: str) -> Any:
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            f"`{wanted}` needs scikit-learn; install it with: pip install 'sde_score[experiments]'"
        ) from error
