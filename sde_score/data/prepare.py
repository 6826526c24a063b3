"""`python -m sde_score.data.prepare mnist|cifar10|celeba|folder --raw DIR --data-dir DIR`: from
original files to what `sde_score.data.load` and `tfds.data_source` read, without TensorFlow.

Nothing is downloaded, unpacked to disk or unpickled. A data set of the usual name has the usual
order, and appears under its name when it is whole.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sde_score._checks import ArgumentError
from sde_score.data import _originals
from sde_score.data.tfds import import_extra

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


class _Recipe(NamedTuple):
    """`read(raw)` gives the shape of an image and the examples of each split."""

    read: Callable[[Path], tuple[tuple, dict[str, _originals.Examples]]]
    name: str
    version: str
    files: dict[str, tuple[str, str]]  # to MD5 and source
    counts: dict[str, int]
    classes: str = ""


_RECIPES = {
    "mnist": _Recipe(
        *(_originals.mnist, "mnist", "3.0.1"),
        {
            "train-images-idx3-ubyte.gz": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", _MNIST),
            "train-labels-idx1-ubyte.gz": ("d53e105ee54ea40749a09fcbcd1e9432", _MNIST),
            "t10k-images-idx3-ubyte.gz": ("9fb629c4189551a2d022fa330f9573f3", _MNIST),
            "t10k-labels-idx1-ubyte.gz": ("ec29112dd5afa0611ce80d1b7f02629c", _MNIST),
        },
        {"train": 60_000, "test": 10_000},
        "0 1 2 3 4 5 6 7 8 9",
    ),
    "cifar10": _Recipe(
        *(_originals.cifar10, "cifar10", "3.0.2"),
        {
            "cifar-10-binary.tar.gz": (
                *("c32a1d4ab5d03f1284b67883e8d87530", "https://www.cs.toronto.edu/~kriz/"),
            )
        },
        {"train": 50_000, "test": 10_000},
        "airplane automobile bird cat deer dog frog horse ship truck",
    ),
    "celeba": _Recipe(
        *(_originals.celeba, "celeb_a", "2.1.0"),
        {
            "img_align_celeba.zip": ("00d2c5bc6d35e252742224ab0c1e8fcb", _CELEBA),
            _originals.PARTITION: ("d32c9cbf5e040fd4025c592c306e6668", _CELEBA),
        },
        {"train": 162_770, "validation": 19_867, "test": 19_962},
    ),
    "folder": _Recipe(_originals.folder, "", "1.0.0", {}, {}),
}


def prepare(
    kind: str,
    raw: str | os.PathLike,
    data_dir: str | os.PathLike,
    *,
    name: str | None = None,
    verify: bool = True,
) -> dict[str, int]:
    """Build the data set `kind`, "mnist", "cifar10", "celeba" or "folder" (whose `name` is free),
    from the files in `raw`; returns the number of examples of each split.

    `verify` demands the original files, by their checksums, and their counts.
    """
    if kind not in _RECIPES:
        raise ArgumentError(f"`kind` must be one of {[*_RECIPES]}; got {kind!r}.")
    recipe, raw = _RECIPES[kind], Path(raw).expanduser()
    wrong = name is not None and not re.fullmatch("[a-z][a-z0-9_]*", name)
    if wrong or (name is None) == (kind == "folder"):
        raise ArgumentError(
            "`name` must be small letters, digits and underscores for a folder, and not be given "
            f"for another kind; got {name!r} for {kind!r}."
        )
    _check_files(raw, recipe.files, verify)
    recipe = recipe._replace(name=name or recipe.name, counts=recipe.counts if verify else {})
    builder = _builder(recipe, raw, Path(data_dir).expanduser().absolute())
    if Path(builder.data_dir).exists():
        raise ArgumentError(f"{builder.data_dir} exists: remove it to make the data set anew.")
    config = import_extra("tensorflow_datasets").download.DownloadConfig(try_download_gcs=False)
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=unused, download_config=config)
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def _builder(recipe: _Recipe, raw: Path, data_dir: Path) -> Any:
    """tfds's builder: it writes to another folder, which it renames in the end."""
    tfds, _ = import_extra("tensorflow_datasets"), import_extra("array_record.python")
    shape, splits = recipe.read(raw)
    features = {"image": tfds.features.Image(shape=shape)}
    if recipe.classes:
        features["label"] = tfds.features.ClassLabel(names=recipe.classes.split())

    with tfds.core.registered.skip_registration():

        class Original(tfds.core.GeneratorBasedBuilder):
            name = recipe.name
            VERSION = tfds.core.Version(recipe.version)

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=not recipe.files,  # a folder stays in the order of its names
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, _originals.Examples]:
                return {s: _counted(x, s, recipe.counts.get(s)) for s, x in splits.items()}

            def _generate_examples(self) -> None:
                raise NotImplementedError  # the splits hold their generators

    return Original(data_dir=data_dir, file_format="array_record")


def _counted(examples: _originals.Examples, split: str, want: int | None) -> _originals.Examples:
    num = 0
    for example in examples:
        num += 1
        yield example
    if want not in (None, num):
        raise ArgumentError(f"The split {split!r} must have {want} examples; it has {num}.")


def _check_files(raw: Path, files: dict[str, tuple[str, str]], verify: bool) -> None:
    missing = [name for name in files if not (raw / name).is_file()]
    optional = set() if verify else {_originals.PARTITION}
    if not raw.is_dir() or set(missing) - optional:
        lines = [f"  {name}, MD5 {files[name][0]}, from {files[name][1]}" for name in missing]
        raise ArgumentError("\n".join([f"{raw} must be a folder with", *(lines or ["  images"])]))
    for name in set(files) - set(missing) if verify else ():
        with (raw / name).open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != files[name][0]:
            raise ArgumentError(
                f"{raw / name} must have the MD5 {files[name][0]}; it has {md5}. Get it again "
                f"from {files[name][1]}, or take it as it is with --no-verify."
            )


def main(arguments: list[str] | None = None) -> int:
    """Build as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sde_score.data.prepare",
        description="Build an image data set from its original files, which you download.",
    )
    parser.add_argument("kind", choices=[*_RECIPES])
    parser.add_argument("--raw", required=True, help="the folder with the files, or the images")
    parser.add_argument("--data-dir", required=True, help="where data sets lie")
    parser.add_argument("--name", help="of the data set made of a folder")
    parser.add_argument(
        "--no-verify", action="store_false", dest="verify", help="take other checksums and counts"
    )
    options = vars(parser.parse_args(arguments))
    try:
        counts = prepare(**options)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{options['data_dir']}:", ", ".join(f"{s} {count}" for s, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
