"""Small files of noise in the formats of the original data sets."""

import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def mnist(raw, num=(7, 3), header=None):
    """The four files in `raw`, and what they hold."""
    parts = {}
    for (split, prefix), n in zip({"train": "train", "test": "t10k"}.items(), num, strict=True):
        images, labels = noise(n, 28, 28, 1), RNG.integers(0, 10, n, np.uint8)
        head = struct.pack(">4I", *(header or (2051, n, 28, 28)))
        for name, data in (
            ("images-idx3", head + images.tobytes()),
            ("labels-idx1", struct.pack(">2I", 2049, n) + labels.tobytes()),
        ):
            (raw / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(data))
        parts[split] = (images, labels)
    return parts


# as they follow each other in the original
CIFAR = [f"data_batch_{i}.bin" for i in (1, 3, 4)]
CIFAR += ["test_batch.bin", "readme.html", "data_batch_5.bin", "data_batch_2.bin"]


def cifar10(raw, num=2, names=CIFAR, cut=0):
    """The archive, whose batches have `num` records each, the last `cut` bytes too few."""
    parts = {"train": ([], []), "test": ([], [])}
    with tarfile.open(raw / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in names:
            images, labels = noise(num, 32, 32, 3), RNG.integers(0, 10, num, np.uint8)
            planes = images.transpose(0, 3, 1, 2).reshape(num, -1)
            data = np.concatenate([labels[:, None], planes], axis=1).tobytes()
            member = tarfile.TarInfo(name if "/" in name else f"cifar-10-batches-bin/{name}")
            member.size = len(data) - cut
            archive.addfile(member, io.BytesIO(data))
            if name.endswith(".bin"):
                part = parts["test" if name.startswith("test") else "train"]
                part[0].extend(images)
                part[1].extend(labels)
    return parts


def celeba(
    raw, names=("000001.jpg", "000002.jpg", "000003.jpg"), partition="012", size=(178, 218)
):
    """The zip file and the list of parts; returns the JPEGs."""
    jpegs = {}
    with zipfile.ZipFile(raw / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for name in names:
            buffer = io.BytesIO()
            coarse = Image.fromarray(noise(12, 10, 3))
            coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
            jpegs[name] = buffer.getvalue()
            archive.writestr(f"img_align_celeba/{name}", jpegs[name])
    if partition is not None:
        lines = [f"{name} {part}\n" for name, part in zip(names, partition, strict=True)]
        (raw / "list_eval_partition.txt").write_text("".join(lines))
    return jpegs
