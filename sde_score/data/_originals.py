"""Readers of the original files of image data sets, for `sde_score.data.prepare`.

Each takes the folder with the files and gives the shape of an image and, for each split, a
generator of (key, example); from the keys tfds draws its order, so they are tfds's own. Files are
read an image at a time, archives member by member, and names and sizes are checked first: what a
header claims is neither believed nor allocated.
"""

import contextlib
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sde_score._checks import ArgumentError
from sde_score.data.tfds import import_extra

Examples = Iterator[tuple[int | str, dict[str, Any]]]
Splits = tuple[tuple, dict[str, Examples]]
PARTITION = "list_eval_partition.txt"
_BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError)
_BROKEN += (lzma.LZMAError, SyntaxError)  # the latter Pillow's, of a broken PNG file
_RECORD = 1 + 3 * 32 * 32  # bytes of CIFAR-10: a label and three colour planes


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a broken file raises becomes one error that names it."""
    bomb = import_extra("PIL.Image").DecompressionBombError
    try:
        yield
    except ArgumentError:
        raise
    except (*_BROKEN, ValueError, bomb) as error:
        raise ArgumentError(f"{path} is not as it must be: {error}. Get it again.") from error


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _take(file: Any, count: int) -> bytes:
    data = file.read(count)
    _require(len(data) == count, "it ends early")
    return data


class _Bounded:
    """A file that refuses to give more than `left` bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        data = self.file.read(min(count, self.left + 1))
        self.left -= len(data)
        _require(self.left >= 0, "it unpacks to more than it should")
        return data


def mnist(raw: Path) -> Splits:
    """Four files in the IDX format."""
    return (28, 28, 1), {"train": _idx(raw, "train"), "test": _idx(raw, "t10k")}


def _idx(raw: Path, prefix: str) -> Examples:
    """Big-endian magic number, count and sides before the pixels; the first two before labels."""
    pillow = import_extra("PIL.Image")
    path, label_path = (raw / f"{prefix}-{n}-ubyte.gz" for n in ("images-idx3", "labels-idx1"))
    with _reading(path), gzip.open(path) as images, gzip.open(label_path) as labels:
        magic, num, *sides = np.frombuffer(_take(images, 16), ">u4").tolist()
        ok = [magic, *sides] == [2051, 28, 28] and num <= 60_000
        _require(ok, f"its header has {magic}, {num}, {sides}")
        with _reading(label_path):
            header = np.frombuffer(_take(labels, 8), ">u4").tolist()
            _require(header == [2049, num], f"its header has {header}, not {[2049, num]}")
        for i in range(num):
            image = pillow.frombytes("L", (28, 28), _take(images, 28 * 28))
            with _reading(label_path):
                label = _take(labels, 1)[0]
            yield i, {"image": image, "label": label}
        _require(not images.read(1), "it goes on after its end")
        with _reading(label_path):
            _require(not labels.read(1), "it goes on after its end")


def cifar10(raw: Path) -> Splits:
    """The binary archive: the other one is a pickle, which could run any code."""
    path, train = raw / "cifar-10-binary.tar.gz", [f"data_batch_{i}.bin" for i in range(1, 6)]
    parts = {
        "train": _cifar_batches(path, train),
        "test": _cifar_batches(path, ["test_batch.bin"]),
    }
    return (32, 32, 3), parts


def _cifar_batches(path: Path, wanted: list[str]) -> Examples:
    pillow = import_extra("PIL.Image")
    found = set()
    files = r"(data_batch_[1-5]|test_batch)\.bin|batches\.meta\.txt|readme\.html"
    with _reading(path), gzip.open(path) as unbounded:
        file: Any = _Bounded(unbounded, 2**28)
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                _require(
                    re.fullmatch(f"cifar-10-batches-bin(/({files}))?", member.name),
                    f"it holds {member.name!r}",
                )
                name = member.name.rpartition("/")[2]
                if name not in wanted:
                    continue
                num, rest = divmod(member.size, _RECORD)
                whole = member.isreg() and rest == 0 and num <= 10_000 and name not in found
                _require(whole, f"{name} is not whole or not alone")
                found.add(name)
                records: Any = archive.extractfile(member)
                for i in range(num):
                    record = np.frombuffer(_take(records, _RECORD), np.uint8)
                    planes = record[1:].reshape(3, 32, 32)
                    image = pillow.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
                    key = 10_000 * wanted.index(name) + i
                    yield key, {"image": image, "label": int(record[0])}
        _require(len(found) == len(wanted), f"it has {sorted(found)} of {wanted}")
        while file.read(2**20):  # up to the end, where gzip compares its checksum
            pass


def celeba(raw: Path) -> Splits:
    """The zip file of aligned JPEGs, which are kept as they are; without the list of the parts
    everything trains.
    """
    path, partition = raw / "img_align_celeba.zip", raw / PARTITION
    with _reading(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            ok = re.fullmatch(r"img_align_celeba/(\d{6}\.jpg)?", info.filename)
            _require(ok and info.file_size < 2**20, f"it holds {info.filename!r}")
        names = sorted({info.filename[-10:] for info in archive.infolist() if not info.is_dir()})
    part_of = dict.fromkeys(names, "0")
    if partition.is_file():
        with _reading(partition):
            part_of = dict(line.split() for line in partition.read_text("ascii").splitlines())
            ok = part_of.keys() == set(names) and set(part_of.values()) <= {"0", "1", "2"}
            _require(ok, "it must give each image of the zip file a part from 0 to 2")
    splits = {"train": "0", "validation": "1", "test": "2"}
    chosen = {s: [name for name in names if part_of[name] == part] for s, part in splits.items()}
    return (218, 178, 3), {s: _jpegs(path, some) for s, some in chosen.items() if some}


def _jpegs(path: Path, names: list[str]) -> Examples:
    pillow = import_extra("PIL.Image")
    with _reading(path), zipfile.ZipFile(path) as archive:
        for name in names:
            data = archive.read(f"img_align_celeba/{name}")
            with pillow.open(io.BytesIO(data)) as image:
                kind = (image.format, image.mode, image.size)
            _require(kind == ("JPEG", "RGB", (178, 218)), f"{name} is {kind}")
            yield name, {"image": io.BytesIO(data)}


def folder(raw: Path) -> Splits:
    """Images of eight bits in the order of their names, as RGB; transparency is dropped."""
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
    paths = sorted(path for path in raw.iterdir() if path.suffix.lower() in suffixes)
    with _reading(raw):
        _require(paths, f"no name in it ends in one of {sorted(suffixes)}")
    sizes = {_with_image(path, lambda image: image.size) for path in paths}
    shape = (*sizes.pop()[::-1], 3) if len(sizes) == 1 else (None, None, 3)
    convert = lambda image: image.convert("RGB")
    images = ((i, {"image": _with_image(path, convert)}) for i, path in enumerate(paths))
    return shape, {"train": images}


def _with_image(path: Path, use: Callable) -> Any:
    with _reading(path), import_extra("PIL.Image").open(path) as image:
        modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
        _require(image.mode in modes, f"its mode is {image.mode}, which is none of {modes}")
        return use(image)
