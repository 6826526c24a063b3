"""PyTorch's checkpoints and safetensors files as numpy arrays, without torch and without trust.

A .pth file is a pickle, a program for a stack machine, beside raw numbers. The machine here has
only the opcodes that build containers, numbers and strings. The few names that it takes stand for
code of this module; nothing that a file names is ever imported.
"""

import hashlib
import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import safe_open

from sde_score import _checks

_MAX_OPCODES = 2**20  # of one pickle: some 60,000 tensors, and about 100 MB of objects at most
_MAX_PICKLE = 2**28
_MAX_DIRECTORY = 2**23  # bytes of a zip file's, in memory ten times as many
_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6
_DTYPES = {"BFloat16": np.dtype(ml_dtypes.bfloat16), "Bool": np.dtype("?")}
_DTYPES |= {"Float": np.dtype("<f4"), "Double": np.dtype("<f8"), "Half": np.dtype("<f2")}
_DTYPES |= {"Long": np.dtype("<i8"), "Int": np.dtype("<i4"), "Short": np.dtype("<i2")}
_DTYPES |= {"Char": np.dtype("i1"), "Byte": np.dtype("u1")}
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_VALUES |= {"BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_LITERALS |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# How many items an opcode takes from the stack; -1: those since the last mark.
_TAKES = {"TUPLE": -1, "SETITEMS": -1, "APPENDS": -1, "SETITEM": 2, "APPEND": 1}
_TAKES |= {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "STACK_GLOBAL": 2}
_TAKES |= {"BINPERSID": 1, "REDUCE": 2, "BUILD": 1}


def read_pth(path: str | os.PathLike, *, max_bytes: int = 2**32, sha256: str | None = None) -> Any:
    """The dictionaries, lists, numbers and read-only numpy arrays in a file of `torch.save`.

    Two formats: the zip file of torch 1.6 and later, whose checksums are verified, and the stream
    before it, which has none: give its `sha256`. Ordered dictionaries become dictionaries,
    parameters arrays. `max_bytes` bounds the file, and what its tensors take together.
    """
    with open_verified(path, max_bytes, sha256) as file:
        start = file.read(4)
        file.seek(0)
        try:
            read = _read_zip if start == b"PK\x03\x04" else _read_stream
            return read(file, os.fstat(file.fileno()).st_size, max_bytes)
        except Exception as error:  # whatever a damaged file leads to
            raise _refusal(path, "a checkpoint of torch.save", error) from error


def read_safetensors(
    path: str | os.PathLike, *, max_bytes: int = 2**32, sha256: str | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name; the format has no checksum: give its `sha256`."""
    with open_verified(path, max_bytes, sha256):
        try:
            with safe_open(path, framework="np") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:
            raise _refusal(path, "a safetensors file", error) from error


def _refusal(path: str | os.PathLike, kind: str, error: Any) -> _checks.ArgumentError:
    reason = error if type(error) in (ValueError, str) else f"{type(error).__name__}: {error}"
    return _checks.ArgumentError(
        f"`path` must be {kind}, whole and harmless; got {os.fspath(path)} ({reason}). Download "
        "it again, from where you trust, and compare its SHA-256 with the published one."
    )


def open_verified(path: str | os.PathLike, max_bytes: int, sha256: str | None) -> BinaryIO:
    """A file of at most that size, with that digest."""
    _checks.check_count("max_bytes", max_bytes)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise _refusal(path, "a file", error) from error
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        file.close()
        raise _checks.ArgumentError(
            f"`path` must be a file of at most `max_bytes` = {max_bytes} bytes; got "
            f"{os.fspath(path)} of {size}. Raise `max_bytes` if you expect as much."
        )
    if sha256 is not None:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        if digest != sha256.lower():
            file.close()
            raise _refusal(path, f"of SHA-256 {sha256}", f"it is {digest}")
    return file


class _Storages:
    """The file's raw arrays, together no larger than the file; and the tensors on them, together
    no larger than `max_bytes`.
    """

    def __init__(self, take: Callable, size: int, max_bytes: int) -> None:
        self.take, self.arrays, self.left, self.left_to_view = take, {}, size, max_bytes

    def find(
        self, kind: Any, dtype: Any, key: Any, _: Any, count: Any, view: Any = None
    ) -> np.ndarray:
        known = kind == "storage" and isinstance(dtype, np.dtype) and view is None
        if not known or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("a storage of an unknown kind")
        if key not in self.arrays:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise ValueError(f"storage {key:.20} of {count} numbers: more than it holds")
            self.arrays[key] = self.take(key, dtype, count)
        array = self.arrays[key]
        if array.dtype != dtype or array.size != count:
            raise ValueError(f"storage {key:.20} of two dtypes or sizes")
        return array

    def view(self, array: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        """A tensor, each element of which lies in its storage, and which is no larger."""
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides))
        if not whole or len(shape) > 8 or not isinstance(array, np.ndarray):
            raise ValueError("a tensor whose shape, strides or offset is not of whole numbers")
        strides = [s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)]
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and max(last + 1, count) > array.size:
            raise ValueError(f"a tensor of shape {shape} beyond its storage of {array.size}")
        self.left_to_view -= count * array.itemsize
        if self.left_to_view < 0:
            raise ValueError("tensors that take more than `max_bytes` together")
        if not count:
            return np.zeros(shape, array.dtype)
        steps = [s * array.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(array[offset:], shape, steps, writeable=False)

    def call(self, name: Any, args: Any) -> Any:
        if type(name) is str and name == _TENSOR:
            return self.view(*args)
        if type(name) is str and name == _PARAMETER and isinstance(args[0], np.ndarray):
            return args[0]
        if type(name) is str and name == _ORDERED_DICT and args == ():
            return {}
        raise ValueError("it would call what is no function, or with wrong arguments")


def _find_name(name: str) -> Any:
    """The dtype that a name stands for, or the name of what `_Storages.call` knows."""
    dtype = _DTYPES.get(name.removeprefix("torch.").removesuffix("Storage"))
    if dtype is None and name not in (_TENSOR, _PARAMETER, _ORDERED_DICT):
        raise ValueError(f"it would call {name:.80}, which is not allowed")
    return name if dtype is None else dtype


def _fill(target: Any, items: list) -> None:
    # Keys that are containers would be hashed, without a bound on the depth; and integers are
    # their own hashes up to 2⁶¹ only.
    known = lambda key: type(key) is str or type(key) is int and abs(key) < 2**60  # noqa: E731
    if type(target) is not dict or not all(map(known, items[::2])):
        raise ValueError("a dictionary whose keys are neither strings nor whole numbers")
    target.update(zip(items[::2], items[1::2], strict=True))


def _run(pickle: Any, storages: _Storages) -> Any:
    """What the pickle builds; a file is left behind its end. Items are freed as they are taken."""
    stack, marked, memo = [], [], {}
    for count, (opcode, value, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if count > _MAX_OPCODES:
            raise ValueError(f"a pickle of more than {_MAX_OPCODES} opcodes")
        if (number := _TAKES.get(name, 0)) < 0:
            items, stack = stack, marked.pop()
        else:
            items = [stack.pop() for _ in range(number)][::-1]
        if name in _VALUES:
            stack.append(value)
        elif name in _LITERALS:
            stack.append(_LITERALS[name]())
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name.startswith("TUPLE"):
            stack.append(tuple(items))
        elif name.startswith("SETITEM"):
            _fill(stack[-1], items)
        elif name.startswith("APPEND"):
            list.extend(stack[-1], items)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if value is None else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_find_name(".".join(items or str(value).split(" "))))
        elif name == "BINPERSID":
            stack.append(storages.find(*items[0]))
        elif name == "REDUCE":
            stack.append(storages.call(*items))
        elif name == "BUILD":  # the layers' versions, an attribute of a state_dict(): left out
            if not type(stack[-1]) is type(items[0]) is dict or set(items[0]) != {"_metadata"}:
                raise ValueError("it would set attributes of an object, which is not allowed")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name} in its pickle, which is not allowed")
    raise ValueError("a pickle without an end")


class _Bounded:
    """A file that gives at most `limit` bytes at a time, and sets no more aside: a zip's directory
    is read at once, and so is whatever length an opcode claims.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.limit = file, limit

    def read(self, size: int = -1) -> bytes:
        if size > self.limit:
            raise ValueError(f"{size} bytes at once, of {self.limit} at most")
        return self.file.read(size if size >= 0 else self.limit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _read_zip(file: BinaryIO, size: int, max_bytes: int) -> Any:
    bounded: Any = _Bounded(file, _MAX_DIRECTORY)
    with zipfile.ZipFile(bounded) as archive:
        bounded.limit = max(size, _MAX_DIRECTORY)
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(members) != len(archive.infolist()):
            raise ValueError("no or several members data.pkl, or two of one name")
        root = pickles[0].removesuffix("data.pkl")

        def member(name: str, length: int) -> bytes:
            info = members[root + name]
            if info.compress_type or not info.file_size == info.compress_size == length <= size:
                raise ValueError(f"{name} is compressed, or not of {length} bytes")
            return archive.read(info)

        def take(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            return np.frombuffer(member(f"data/{key}", count * dtype.itemsize), dtype)

        if root + "byteorder" in members and member("byteorder", 6) != b"little":
            raise ValueError("big-endian numbers")
        length = members[pickles[0]].file_size
        if length > _MAX_PICKLE:
            raise ValueError(f"a pickle of {length} bytes")
        program = member("data.pkl", length)
        return _run(program, _Storages(take, size, max_bytes))


def _read_stream(file: Any, size: int, max_bytes: int) -> Any:
    # The numbers follow the pickles: the arrays are filled last.
    file = _Bounded(file, size)
    storages = _Storages(lambda _, dtype, count: np.empty(count, dtype), size, max_bytes)
    if _run(file, storages) != _MAGIC or _run(file, storages) != 1001:
        raise ValueError("neither a zip file nor one of torch before 1.6")
    if _run(file, storages)["little_endian"] is not True:
        raise ValueError("big-endian numbers")
    root, keys = _run(file, storages), _run(file, storages)
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages.arrays):
        raise ValueError("storages that are not those of the tensors")
    for key in keys:
        array = storages.arrays[key]
        count = int.from_bytes(file.read(8), "little")
        if count != array.size or file.readinto(array.view(np.uint8)) != array.nbytes:
            raise ValueError(f"storage {key:.20} is cut short")
    if file.read(1):
        raise ValueError("bytes behind its end")
    return root
