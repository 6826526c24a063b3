"""Image data sets on disk, read through tensorflow_datasets without TensorFlow: whole, or streamed
past the device's memory. Nothing is downloaded; `sde_score.data.prepare` makes them.
"""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sde_score import _checks
from sde_score.data.builtin import Examples

_COMMANDS = {"mnist": "mnist", "cifar10": "cifar10", "celeb_a": "celeba"}


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Random access: source[i] is one image uint8 [height, width, channels] and its label int32,
    −1 where the data set has none.
    """

    records: Sequence[Any]
    advice: str
    crop: int | None = None
    size: int | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Examples:
        try:
            record = self.records[index]
        except (RuntimeError, OSError) as error:  # of the file, and of an image in it
            raise _checks.ArgumentError(
                f"Entry {index} of {self.records} cannot be read: {error}. {self.advice}"
            ) from error
        label: Any = np.asarray(record.get("label", -1), np.int32)
        return Examples(_fit(record["image"], self.crop, self.size), label)


def open_source(
    name: str,
    *,
    data_dir: str | os.PathLike,
    split: str,
    crop: int | None = None,
    size: int | None = None,
) -> ImageSource:
    """A split, such as "train" or "train[90%:]", of the data set `name` that lies in `data_dir` as
    array_record, with features "image" and maybe "label".

    `crop` takes the central square of that side, `size` scales the central square, by default the
    largest, to that side (bilinear, antialiased): Song et al. (2021) crop CelebA to 140 and scale
    it to 64.
    """
    tfds, _ = import_extra("tensorflow_datasets"), import_extra("array_record.python")
    for option, value in (("crop", crop), ("size", size)):
        if value is not None:
            _checks.check_count(option, value)
    kind = _COMMANDS.get(str(name).split(":")[0], f"folder --name {name}")
    advice = (
        "If the data set is missing or broken, remove its folder and run: python -m "
        f"sde_score.data.prepare {kind} --raw DIR --data-dir {data_dir}"
    )
    try:
        builder = tfds.core.read_only_builder.builder_from_files(
            str(name), data_dir=os.path.expanduser(data_dir)
        )
        # parquet is another random-access format, whose writer has been seen to lose rows
        records = builder.as_data_source(str(split), file_format="array_record")
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise _checks.ArgumentError(
            f"`name` and `split` must be those of a data set in {data_dir}; got {name!r} and "
            f"{split!r}: {reason}. {advice}"
        ) from error
    if "image" not in builder.info.features:
        raise _checks.ArgumentError(
            f'`name` must be a data set with a feature "image"; {name!r} has '
            f"{sorted(builder.info.features)}."
        )
    return ImageSource(records, advice, crop, size)


def load(name: str, *, data_dir: str | os.PathLike, split: str, **options: int) -> Examples:
    """All of `open_source` on the device as uint8, which `batches` gathers from in the step."""
    source = open_source(name, data_dir=data_dir, split=split, **options)
    images = np.empty((len(source), *source[0].images.shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i in range(len(source)):
        image, labels[i] = source[i]
        fix = f"It is that of entry 0, which entry {i} differs from: give `size`."
        _checks.check_shape("images", image.shape, images.shape[1:], fix)
        images[i] = image
    return Examples(jnp.asarray(images), jnp.asarray(labels))


def _fit(image: np.ndarray, crop: int | None, size: int | None) -> Any:
    if crop is None and size is None:
        return image
    height, width, channels = image.shape
    side = crop or min(height, width)
    if side > min(height, width):
        raise _checks.ArgumentError(
            f"`crop` must be at most the sides, {image.shape}; got {crop}."
        )
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    pillow, shape = import_extra("PIL.Image"), (size or side, size or side)
    flat = pillow.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(flat.resize(shape, pillow.BILINEAR)).reshape(*shape, channels)


def import_extra(module: str) -> Any:
    """A module of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Data sets on disk need {module.split('.')[0]}; install it with: "
            "pip install 'sde_score[data]'"
        ) from error
