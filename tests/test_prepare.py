"""Synthetic files in the original formats come back pixel for pixel; broken, hostile and missing
ones are refused by name, and leave nothing behind that could be read.
"""

import io
import re
import shutil
import zipfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import sde_score as ss
from sde_score.data import prepare as command
from sde_score.data.prepare import main, prepare
from tests import originals


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def pairs(images, labels):
    """Order apart, as tfds shuffles."""
    return sorted((np.asarray(x).tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
def test_labelled_images_come_back_pixel_for_pixel(raw, tmp_path, capsys, kind):
    parts = getattr(originals, kind)(raw)
    data = tmp_path / "data"
    command_line = [kind, "--raw", str(raw), "--data-dir", str(data), "--no-verify"]
    assert main(command_line) == 0
    counts = ", ".join(f"{split} {len(images)}" for split, (images, _) in parts.items())
    assert capsys.readouterr().out == f"{data}: {counts}\n"
    for split, (images, labels) in parts.items():
        found = ss.data.load(kind, data_dir=data, split=split)
        assert found.images.dtype == np.uint8 and found.labels.dtype == np.int32
        assert pairs(*found) == pairs(images, labels)
        # the call that everyone else makes, of the official class
        for ours, theirs in zip(
            *(found.images, tfds.data_source(kind, data_dir=data, split=split, download=False)),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs["image"])
    assert main(command_line) == 1
    assert f"{kind}/3.0." in (said := capsys.readouterr().err) and "remove it" in said


def test_mnist_has_the_order_of_tfds(raw, tmp_path):
    """That of the hashes of the keys 0, 1, … with the split's name as salt: another key, another
    order, and "train[90%:]" would be other images than everyone's.
    """
    images, _ = originals.mnist(raw)["train"]
    prepare("mnist", raw, tmp_path, verify=False)
    hasher = tfds.core.hashing.Hasher("train")
    order = sorted(range(len(images)), key=hasher.hash_key)
    found = ss.data.load("mnist", data_dir=tmp_path, split="train")
    np.testing.assert_array_equal(found.images, images[order])
    part = ss.data.load("mnist", data_dir=tmp_path, split="train[5:]")
    np.testing.assert_array_equal(part.images, images[order[5:]])


def test_faces_keep_their_jpegs_and_parts(raw, tmp_path):
    jpegs = originals.celeba(raw)
    assert prepare("celeba", raw, tmp_path, verify=False) == dict(train=1, validation=1, test=1)
    for split, jpeg in zip(("train", "validation", "test"), jpegs.values(), strict=True):
        want = np.asarray(Image.open(io.BytesIO(jpeg)))
        found = ss.data.load("celeb_a", data_dir=tmp_path, split=split)
        np.testing.assert_array_equal(found.images, want[None])
        assert found.labels.tolist() == [-1]
        (official,) = tfds.data_source("celeb_a", data_dir=tmp_path, split=split, download=False)
        np.testing.assert_array_equal(official["image"], want)
        small = ss.data.load("celeb_a", data_dir=tmp_path, split=split, crop=140, size=64)
        centre = want[39:179, 19:159].astype(np.float32)
        resized = jax.image.resize(centre, (64, 64, 3), "linear", antialias=True)
        # each of two passes of pillow rounds, by half a level
        np.testing.assert_allclose(np.float32(small.images[0]), resized, atol=1.01)


def test_faces_without_a_list_of_parts_all_train(raw, tmp_path):
    originals.celeba(raw, partition=None)
    assert prepare("celeba", raw, tmp_path, verify=False) == {"train": 3}


def test_a_folder_keeps_the_order_of_its_names(raw, tmp_path):
    grey, colour, small = originals.noise(6, 5), originals.noise(6, 5, 3), originals.noise(4, 4, 3)
    Image.fromarray(grey).save(raw / "b.png")
    Image.fromarray(colour).quantize(8).save(raw / "a.PNG")
    Image.fromarray(np.dstack([colour, grey])).save(raw / "c.webp", lossless=True, exact=True)
    (raw / "notes.txt").write_text("no image")
    palette = np.asarray(Image.open(raw / "a.PNG").convert("RGB"))
    assert prepare("folder", raw, tmp_path, name="mine") == {"train": 3}
    found = ss.data.load("mine", data_dir=tmp_path, split="train").images
    np.testing.assert_array_equal(found, [palette, np.dstack([grey] * 3), colour])
    Image.fromarray(small).save(raw / "d.bmp")
    prepare("folder", raw, tmp_path, name="mixed")
    with pytest.raises(ValueError, match=r"shape \(6, 5, 3\); got \(4, 4, 3\).*entry 3.*`size`"):
        ss.data.load("mixed", data_dir=tmp_path, split="train")
    found = ss.data.load("mixed", data_dir=tmp_path, split="train", size=4).images
    np.testing.assert_array_equal(found[3], small)
    with pytest.raises(ValueError, match="`crop` must be at most the sides"):
        ss.data.load("mixed", data_dir=tmp_path, split="train", crop=5)


def cut(name, keep):
    """A file that ends early, at a share or a number of its bytes."""

    def damage(raw):
        data = (raw / name).read_bytes()
        (raw / name).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])

    return damage


def flip(name, place):
    """A file with one other byte."""

    def damage(raw):
        data = bytearray((raw / name).read_bytes())
        data[int(place * len(data))] ^= 0x55
        (raw / name).write_bytes(data)

    return damage


def two(first, second):
    return lambda raw: [first(raw), second(raw)]


def extra_member(raw):
    originals.celeba(raw)
    with zipfile.ZipFile(raw / "img_align_celeba.zip", "a") as archive:
        archive.writestr("img_align_celeba/../../000009.jpg", b"")


def bomb(raw):
    originals.celeba(raw, partition=None)
    with zipfile.ZipFile(raw / "img_align_celeba.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("img_align_celeba/000009.jpg", bytes(2**24))


IMAGES = "train-images-idx3-ubyte.gz"
FAULTS = {
    "truncated gzip": ("mnist", two(originals.mnist, cut(IMAGES, 0.5)), IMAGES),
    "no gzip": ("mnist", two(originals.mnist, lambda r: (r / IMAGES).write_bytes(b"x")), IMAGES),
    "labels truncated": (
        "mnist",
        two(originals.mnist, cut("t10k-labels-idx1-ubyte.gz", 0.5)),
        "t10k-labels.*not as it must be",
    ),
    "wrong magic": ("mnist", lambda r: originals.mnist(r, header=(2052, 7, 28, 28)), "2052"),
    "labels of another count": (
        *("mnist", lambda r: originals.mnist(r, header=(2051, 6, 28, 28))),
        r"header has \[2049, 7\], not \[2049, 6\]",
    ),
    "sides of a bomb": (
        *("mnist", lambda r: originals.mnist(r, header=(2051, 7, 2**31, 2**31))),
        "2147483648",
    ),
    "no tar": (
        *("cifar10", lambda r: (r / "cifar-10-binary.tar.gz").write_bytes(b"x" * 99)),
        "cifar-10-binary.tar.gz is not",
    ),
    "truncated tar": (
        *("cifar10", two(originals.cifar10, cut("cifar-10-binary.tar.gz", 0.7))),
        "cifar-10-binary.tar.gz is not",
    ),
    "a flipped byte of the tar": (
        *("cifar10", two(originals.cifar10, flip("cifar-10-binary.tar.gz", 0.6))),
        "cifar-10-binary.tar.gz is not",
    ),
    "half a record": ("cifar10", lambda r: originals.cifar10(r, cut=5), "is not whole"),
    "a batch twice": (
        *("cifar10", lambda r: originals.cifar10(r, names=[*originals.CIFAR, "test_batch.bin"])),
        "test_batch.bin is not whole or not alone",
    ),
    "a batch too few": (
        *("cifar10", lambda r: originals.cifar10(r, names=originals.CIFAR[1:])),
        "it has .* of .*data_batch_1.bin",
    ),
    "a path out of the tar": (
        *("cifar10", lambda r: originals.cifar10(r, names=["cifar-10-batches-bin/../../x.bin"])),
        "holds 'cifar-10-batches-bin/../../x.bin'",
    ),
    "a path out of the zip": ("celeba", extra_member, r"holds 'img_align_celeba/\.\./"),
    "a bomb in the zip": ("celeba", bomb, "holds 'img_align_celeba/000009.jpg'"),
    "a byte of a zipped image": (
        *("celeba", two(originals.celeba, flip("img_align_celeba.zip", 0.3))),
        "img_align_celeba.zip is not.*Bad CRC",
    ),
    "faces of another size": (
        *("celeba", lambda r: originals.celeba(r, size=(178, 219))),
        r"000001.jpg is \('JPEG', 'RGB', \(178, 219\)\)",
    ),
    "a part of none": ("celeba", lambda r: originals.celeba(r, partition="013"), "from 0 to 2"),
    "a list of too few": (
        *("celeba", two(originals.celeba, cut("list_eval_partition.txt", 26))),
        "list_eval_partition.txt is not",
    ),
    "no images": ("folder", lambda r: (r / "notes.txt").write_text(""), "no name in it ends in"),
    "no image": ("folder", lambda r: (r / "a.png").write_bytes(b"x"), r"a\.png is not"),
    "sixteen bits": (
        *("folder", lambda r: Image.fromarray(np.ones((4, 4), np.uint16)).save(r / "a.png")),
        r"a\.png is not.*mode is I;16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named_and_leaves_nothing(raw, tmp_path, capsys, fault):
    kind, make, message = FAULTS[fault]
    make(raw)
    data, name = tmp_path / "data", ["--name", "mine"] if kind == "folder" else []
    assert main([kind, "--raw", str(raw), "--data-dir", str(data), "--no-verify", *name]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, said) and "Traceback" not in said, said
    assert not [path for path in data.rglob("*") if path.is_file()]
    assert not (tmp_path / "x.bin").exists()


def test_missing_files_are_listed_with_source_and_checksum(raw, tmp_path, capsys):
    for kind, digest, source in (
        ("mnist", "f68b3c2dcbeaaa9fbdd348bbdeb94873", "cvdf-datasets/mnist/"),
        ("cifar10", "c32a1d4ab5d03f1284b67883e8d87530", "https://www.cs.toronto.edu/~kriz/"),
        ("celeba", "00d2c5bc6d35e252742224ab0c1e8fcb", "mmlab.ie.cuhk.edu.hk"),
    ):
        assert main([kind, "--raw", str(raw), "--data-dir", str(tmp_path / "data")]) == 1
        said = capsys.readouterr().err
        assert digest in said and source in said and str(raw) in said
    assert main(["folder", "--name", "x", "--raw", str(raw / "no"), "--data-dir", "x"]) == 1
    assert "must be a folder with\n  images" in capsys.readouterr().err


def test_other_files_than_the_original_need_no_verify(raw, tmp_path):
    originals.mnist(raw)
    with pytest.raises(ValueError, match="must have the MD5 .*; it has .*--no-verify"):
        prepare("mnist", raw, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_another_count_than_the_original_leaves_nothing(raw, tmp_path, monkeypatch):
    originals.mnist(raw)
    monkeypatch.setattr(command, "_check_files", lambda *_: None)
    with pytest.raises(ValueError, match="'train' must have 60000 examples; it has 7"):
        prepare("mnist", raw, tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../up", "Big", "", None])
def test_names_of_folders_cannot_leave_the_data_directory(raw, tmp_path, name):
    with pytest.raises(ValueError, match="`name` must be small letters"):
        prepare("folder", raw, tmp_path, name=name)


def test_wrong_kinds_are_refused(raw, tmp_path):
    with pytest.raises(ValueError, match="`kind` must be one of"):
        prepare("imagenet", raw, tmp_path)
    with pytest.raises(ValueError, match="not be given for another kind"):
        prepare("mnist", raw, tmp_path, name="mine")


def test_what_a_killed_build_leaves_is_never_read(raw, tmp_path):
    originals.mnist(raw)
    prepare("mnist", raw, tmp_path, verify=False)
    whole = tmp_path / "mnist" / "3.0.1"
    shutil.move(whole, whole.with_name("incomplete.ABCDEF_3.0.1"))  # where tfds builds
    remedy = "sde_score.data.prepare mnist --raw DIR --data-dir"
    with pytest.raises(ValueError, match=f"'mnist' and 'train'.*{remedy}"):
        ss.data.load("mnist", data_dir=tmp_path, split="train")
    prepare("mnist", raw, tmp_path, verify=False)
    (shard,) = whole.glob("mnist-train*")
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"Entry 0 of .*cannot be read.*{remedy}"):
        ss.data.load("mnist", data_dir=tmp_path, split="train")
    shard.unlink()
    with pytest.raises(ValueError, match=remedy):
        ss.data.load("mnist", data_dir=tmp_path, split="train")
