"""Files of torch.save and safetensors, read without torch: whole, damaged and hostile ones."""

import hashlib
import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sde_score.pretrained._torch_file import read_pth, read_safetensors

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = DATA / "vp_ddpmpp.pth"


def same(a, b):
    """Equal structures, dtypes, shapes and numbers."""
    leaves, others = (jax.tree.leaves(tree, is_leaf=lambda x: x is None) for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(x, y)
        for x, y in zip(leaves, others, strict=True)
    )


def test_a_published_checkpoint_is_read_exactly():
    """Against a digest of the same tensors as torch 2.13 reads them (weights_only=True)."""
    file = read_pth(PUBLISHED, sha256=hashlib.sha256(PUBLISHED.read_bytes()).hexdigest())
    assert list(file) == ["optimizer", "model", "ema", "step"] and file["step"] == 12345
    shadow = file["ema"]["shadow_params"]
    assert len(shadow) == 154 and len(file["model"]) == 155
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in shadow))
    assert digest.hexdigest() == "1af92a2be17d25792be07c12bacb72baed3c19302277c115802ec19381471be2"


def test_both_formats_give_what_was_saved():
    """One object of torch 2.13, saved in the format of 1.6 and later and in that before it."""
    new, old = (read_pth(DATA / f"torch_{name}.pth") for name in ("zip", "stream"))
    assert same(new, old)
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    for got, want in zip(new["views"], (base.T, base[1:3, ::2], base[3]), strict=True):
        np.testing.assert_array_equal(got, want)
    for name, got in new["dtypes"].items():
        wide = np.array([0, 1, 2, 3], bool if name == "bool" else np.float64)
        assert got.dtype == getattr(ml_dtypes, name, None) or got.dtype == np.dtype(name)
        np.testing.assert_array_equal(got.astype(wide.dtype), wide)
    assert new["scalar"].shape == () and new["scalar"] == 3.5 and new["empty"].shape == (0, 3)
    assert new["step"] == 12345 and new["decay"] == 0.9999 and new["none"] is None
    assert new["pair"] == (1, "two") and new["parameter"].tolist() == [0.5, 0.5]
    assert type(new["model"]) is dict and list(new["model"])[:2] == ["0.weight", "0.bias"]
    assert not any(a.flags.writeable for a in new["shadow"])


def archive(program, members=(), compression=zipfile.ZIP_STORED):
    """A zip file as of torch.save, with this pickle and these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in [("data.pkl", program), *members]:
            file.writestr(f"m/{name}", content)
    return buffer.getvalue()


def read(tmp_path, content, **options):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    return read_pth(path, **options)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    length = 8 if abs(value) < 2**63 else 255
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def tensor(count=4, offset=0, shape=(4,), strides=(1,), key="0", name=b"torch\nFloatStorage\n"):
    """The opcodes of one tensor, whose numbers may lie."""
    storage = (
        b"(" + text("storage") + b"c" + name + text(key) + text("cpu") + number(count) + b"tQ"
    )
    sizes = b"".join(b"(" + b"".join(map(number, ns)) + b"t" for ns in (shape, strides))
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return view + storage + number(offset) + sizes + hooks + b"tR"


NUMBERS = np.arange(4, dtype=np.float32)
STORAGE = [("data/0", NUMBERS.tobytes())]


def test_a_tensor_written_by_hand_is_read(tmp_path):
    """So the refusals below are of what they change in it."""
    whole = read(tmp_path, archive(b"\x80\x02" + tensor() + b".", STORAGE))
    np.testing.assert_array_equal(whole, NUMBERS)
    part = read(
        tmp_path, archive(tensor(offset=1, shape=(2, 1), strides=(2, 2**40)) + b".", STORAGE)
    )
    np.testing.assert_array_equal(part, [[1.0], [3.0]])


LIES = {
    "more numbers than the file": tensor(count=2**40),
    "less than none": tensor(count=-4),
    "offset beyond the storage": tensor(offset=1),
    "offset before it": tensor(offset=-1),
    "strides beyond it": tensor(shape=(2, 2), strides=(3, 1)),
    "strides backwards": tensor(offset=3, strides=(-1,)),
    "each number many times": tensor(shape=(2**20,), strides=(0,)),
    "shape against strides": tensor(shape=(2, 2)),
    "shape that overflows": tensor(shape=(2**62, 4), strides=(2**62, 2**62)),
    "a size of 600 digits": tensor(shape=(2**2000,), strides=(1,)),
    "more axes than any": tensor(shape=(1,) * 8 + (4,), strides=(1,) * 9),
    "empty shape that overflows": tensor(shape=(2**62, 0), strides=(1, 1)),
    "a storage that is missing": tensor(key="1"),
    "a storage outside of the archive's folder": tensor(key="../../x"),
    "two dtypes": b"(" + tensor() + tensor(2, name=b"torch\nDoubleStorage\n", shape=(2,)) + b"t",
    "no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00)))tR",
}


@pytest.mark.parametrize("program", LIES.values(), ids=LIES)
def test_tensors_that_lie_are_refused(tmp_path, program):
    with pytest.raises(ValueError, match="`path` must be a checkpoint of torch.save, whole"):
        read(tmp_path, archive(program + b".", STORAGE))


def test_what_would_expand_is_refused(tmp_path):
    zeros = bytes(2**20)
    big = tensor(2**18, shape=(2**18,))
    for content, reason in [
        (archive(big + b".", [("data/0", zeros)], zipfile.ZIP_DEFLATED), "compressed"),
        (archive(b"(" + 2**21 * b"N" + b"t."), "more than 1048576 opcodes"),
        (archive(b"\x80\x02" + text("x" * 100)[:-50] + b"."), "ValueError|expected"),
    ]:
        with pytest.raises(ValueError, match=reason):
            read(tmp_path, content)
    # A directory of 8 MB and more, of members without content:
    directory = archive(b"N.").rpartition(b"PK\x05\x06")[0].rpartition(b"PK\x01\x02")
    entry = directory[1] + directory[2]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, 2**23 + 60, len(directory[0]), 0)
    with pytest.raises(ValueError, match="8388668 bytes at once, of 8388608 at most"):
        read(tmp_path, directory[0] + (entry * (2**23 // len(entry) + 2))[: 2**23 + 60] + end)
    shared = archive(b"(" + 9 * big + b"t.", [("data/0", zeros)])
    assert len(read(tmp_path, shared)) == 9  # views of one storage
    with pytest.raises(ValueError, match="more than `max_bytes` together"):
        read(tmp_path, shared, max_bytes=8 * 2**20)
    with pytest.raises(ValueError, match="at most `max_bytes` = 1000 bytes; got .* Raise"):
        read(tmp_path, shared, max_bytes=1000)


@pytest.mark.parametrize("opcode", [b"X" + b"\xff" * 4, b"\x8d" + struct.pack("<Q", 6 * 2**30)])
def test_a_claimed_length_is_not_set_aside(tmp_path, opcode):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="bytes at once, of [0-9]+ at most"):
            read(tmp_path, b"\x80\x04" + opcode + bytes(9))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


class Call:
    """Pickled, it calls `function(*args)` when it is loaded."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def evil(function, *args):
    return {"model": Call(function, *args)}


HOSTILE = {
    "os.system": (lambda path: evil(os.system, f"mkdir {path}"), "system"),
    "os.mkdir": (lambda path: evil(os.mkdir, path), "mkdir"),
    "eval": (lambda path: evil(eval, f"__import__('os').mkdir({path!r})"), "builtin.*eval"),
    "exec": (lambda path: evil(exec, f"import os; os.mkdir({path!r})"), "builtin.*exec"),
    "getattr": (lambda path: evil(getattr, Call(__import__, "os"), "mkdir"), "builtin"),
    "a class": (lambda path: evil(Path, path), "pathlib.*Path"),
    "inside a list's items": (lambda path: {"ema": [[1, Call(os.mkdir, path)]]}, "mkdir"),
    "a key": (lambda path: {Call(os.mkdir, path): 1}, "mkdir"),
    "state": (lambda path: Call(Path, state={"__setstate__": Call(os.mkdir, path)}), "Path"),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_pickle_would_call_is_named_and_not_called(tmp_path, name, protocol):
    make, named = HOSTILE[name]
    target = tmp_path / "made"
    program = pickle.dumps(make(str(target)), protocol)
    stream = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    stream += pickle.dumps({"little_endian": True}, 2)
    # Opcodes of protocols 0 and 4 that torch never writes are refused before a name is seen.
    expected = f"would call \\S*{named}\\S*, which is not allowed|opcode [A-Z_0-9]+ in its pickle"
    for content in (archive(program), stream + program):
        with pytest.raises(ValueError, match=expected):
            read(tmp_path, content)
    if protocol == 2:
        with pytest.raises(ValueError, match=f"would call \\S*{named}"):
            read(tmp_path, archive(program))
    assert not target.exists()


MKDIR = b"cos\nmkdir\n"
ORDERED = b"ccollections\nOrderedDict\n"
OPCODES = {
    "in an ordered dictionary's arguments": ORDERED + b"(](" + text("a") + MKDIR + b"(tRetR",
    "an ordered dictionary of pairs": ORDERED + b"((" + text("a") + b"K\x01tttR",
    "what a call made": ORDERED + b")R" + b")R",
    "a storage type": b"ctorch\nFloatStorage\n)R",
    "a parameter of no tensor": b"ctorch._utils\n_rebuild_parameter\n(K\x01tR",
    "state of a dictionary": b"}" + b"}" + text("__class__") + b"K\x01sb",
    "state of an ordered dictionary": ORDERED + b")R}" + text("__dict__") + b"}sb",
    "state of a tensor": tensor() + b"}" + text("_metadata") + b"}sb",
    "state that is a method": b"}" + text("__setstate__") + b"b",
    "an instance": b"(ios\nmkdir\n",
    "an object": b"(" + MKDIR + b"o",
    "a new object": ORDERED + b")\x81",
    "an extension": b"\x82\x01",
    "a persistent name": b"Pname\n",
    "a persistent identity that is no tuple": b"K\x01Q",
    "a storage of another kind": b"(" + text("module") + b"NNNNtQ",
    "a dotted name": b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93",
    "a name that is no text": b"K\x01K\x02\x93",
    "a deep key": b"}" + b")" + 2**17 * b"\x85" + b"K\x01s",
    "a key that collides": b"}" + number(2**61 - 1) + b"K\x01s",
    "a key that is a list": b"}]K\x01s",
    "an item of what is no list": b"K\x01K\x02a",
    "nothing on the stack": b"0",
    "no mark": b"t",
    "a memo that is not there": b"h\x05",
}


@pytest.mark.parametrize("program", OPCODES.values(), ids=OPCODES)
def test_other_programs_are_refused(tmp_path, program):
    with pytest.raises(ValueError, match="`path` must be .* Download it again, from where you"):
        read(tmp_path, archive(program + b".", STORAGE))


def test_depth_cycles_and_far_memos_cost_nothing(tmp_path):
    deep = read(tmp_path, archive(2**17 * b"]" + (2**17 - 1) * b"a" + b"."))
    for _ in range(2**17 - 1):
        deep = deep[0]
    assert deep == []
    # Not a table of 2^32 entries:
    far = read(tmp_path, archive(b"]r" + struct.pack("<I", 2**32 - 1) + b"."))
    assert far == []
    cycle = read(tmp_path, archive(b"]q\x00h\x00a."))
    assert cycle[0] is cycle


def refused_or_same(tmp_path, content, truth):
    """True where the file was refused; numbers other than the true ones fail."""
    try:
        got = read(tmp_path, content)
    except ValueError as error:
        assert str(error).startswith("`path` must be")
        return True
    assert same(got, truth)
    return False


@pytest.mark.parametrize(
    "name, points", [("vp_ddpmpp", 25), ("torch_zip", 80), ("torch_stream", 80)]
)
def test_a_file_cut_short_is_refused(tmp_path, name, points):
    content = (DATA / f"{name}.pth").read_bytes()
    for length in np.linspace(0, len(content) - 1, points).astype(int):
        assert refused_or_same(tmp_path, content[:length], None), length


@pytest.mark.parametrize("name, flips", [("vp_ddpmpp", 40), ("torch_zip", 300)])
def test_a_flipped_bit_is_found_or_without_effect(tmp_path, name, flips):
    """The zip format's checksums cover every member, and its headers are said twice."""
    path = DATA / f"{name}.pth"
    content, truth, found = path.read_bytes(), read_pth(path), 0
    draw = random.Random(0)  # noqa: S311
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        found += refused_or_same(tmp_path, bytes(damaged), truth)
    # The rest lie in padding, dates and members without effect; in the large file most are data.
    assert found > flips * (0.8 if name == "vp_ddpmpp" else 0.3)


def test_another_sha256_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SHA-256 0000, whole.*it is [0-9a-f]{64}.*Download"):
        read_pth(PUBLISHED, sha256="0000")
    with pytest.raises(ValueError, match="`path` must be a file.*No such file"):
        read_pth(tmp_path / "absent.pth")


def test_safetensors_of_every_dtype_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    tensors |= {"c": np.arange(3), "d": np.float16([0.5]), "e": np.array(2.0, np.float32)}
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(read_safetensors(path, sha256=digest), tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a safetensors file, whole"):
        read_safetensors(path)
    with pytest.raises(ValueError, match="it is "):
        read_safetensors(path, sha256=digest)
