"""More examples than memory holds: a function of one example over many, a chunk at a time."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sde_score import _checks
from sde_score._typing import travelling

Progress: TypeAlias = Callable[[int, int, float], None]
"""`progress(done, total, seconds)`, after each chunk."""


class ChunkError(RuntimeError):
    """A chunk failed; `finished` holds the results of those before it, or None."""

    finished: Any = None


def print_progress(done: int, total: int, seconds: float) -> None:
    """One line on standard error for each chunk."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {done}/{total}  {seconds:.1f} s\n")
    sys.stderr.flush()


def map_in_chunks(
    fn: Callable,
    xs: Any,
    *args: Any,
    chunk_size: int,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Any:
    """numpy arrays of fn(x_i, *args) for each x_i along the leading axis of the pytree `xs`,
    `chunk_size` at a time on the device.

    With keys for `xs`, fn = lambda key, s: sample_ode(key, s, sde, shape) and args = (s,) it draws
    samples: sample i is a function of key i, so the noise is the same bit for bit whatever the
    chunk, and the samples are up to the order of sums, which for adaptive steps means up to their
    tolerance. Compiled once for each fn, as the last chunk is filled up. A `mesh` of this
    process's devices (make_mesh(local=True)) cuts the chunks among them. Where a chunk fails, by a
    solve that exhausts its steps, say, the `ChunkError` keeps the finished ones.
    """
    _checks.check_count("chunk_size", chunk_size)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise _checks.ArgumentError(
            "`xs` must have one leading axis of at least 1, the same for all its leaves; got "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(xs)]}."
        )
    (total,) = sizes.pop()
    fn, args = travelling(fn), tuple(travelling(arg) for arg in args)
    size, place = min(chunk_size, total), lambda chunk: chunk
    if mesh is not None:
        size += -size % mesh.size
        place = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        fn, args = jax.device_put((fn, args), NamedSharding(mesh, PartitionSpec()))
    start, chunks = time.perf_counter(), []
    for first in range(0, total, chunk_size):
        done = min(first + chunk_size, total)
        try:
            values = _run(fn, place(_rows(xs, first, size)), args)
            values = jax.tree.map(lambda leaf, n=done - first: np.asarray(leaf)[:n], values)
        except (_checks.ArgumentError, TypeError):  # a wrong call, not a failure of the device's
            raise
        except Exception as error:  # of the device, which JAX wraps in one or another
            failure = ChunkError(
                f"Examples {first} to {done - 1} of {total} failed: {_reason(error)}\n"
                f"The results of the {first} before them are in this error's `finished`."
            )
            failure.finished = _join(chunks) if chunks else None
            raise failure from error
        chunks.append(values)
        if progress is not None:
            progress(done, total, time.perf_counter() - start)
    return _join(chunks)


def map_to_disk(
    fn: Callable,
    xs: Any,
    *args: Any,
    folder: str | os.PathLike,
    chunk_size: int,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Path:
    """`map_in_chunks` of an array-valued fn into folder/FIRST.npy, a file for each chunk, named by
    its first index and whole or not there: those that are there are not made again. Each of
    several processes makes every P-th. `load_chunks` reads them. What the folder is of, `xs`,
    `args` and the chunks, is noted in folder/index.json: a call with others is refused.
    """
    _checks.check_count("chunk_size", chunk_size)
    folder, total = Path(folder), len(jax.tree.leaves(xs)[0])
    folder.mkdir(parents=True, exist_ok=True)
    _note(folder, {"total": total, "chunk_size": chunk_size, "sha256": _digest(fn, xs, args)})
    firsts = range(0, total, chunk_size)[jax.process_index() :: jax.process_count()]
    start = time.perf_counter()
    for first in firsts:
        path, last = folder / f"{first:09d}.npy", min(first + chunk_size, total)
        if not path.exists():
            part = _rows(xs, first, chunk_size)  # all of one length: one compilation
            values = map_in_chunks(fn, part, *args, chunk_size=chunk_size, mesh=mesh)
            if not isinstance(values, np.ndarray):
                raise _checks.ArgumentError(
                    "`fn` must return one array; got a container. Return its part, or stack it."
                )
            unfinished = path.with_suffix(f".{os.getpid()}.partial")
            with unfinished.open("wb") as file:
                np.save(file, values[: last - first])
            os.replace(unfinished, path)
        if progress is not None:
            progress(last, total, time.perf_counter() - start)
    return folder


def load_chunks(folder: str | os.PathLike, total: int) -> np.ndarray:
    """The `total` results in a folder of `map_to_disk`, in order; what is missing is named."""
    parts, done = [], 0
    for path in sorted(Path(folder).glob("*.npy")):
        if int(path.stem) != done:
            break
        parts.append(np.load(path, allow_pickle=False))
        done += len(parts[-1])
    if done != total:
        raise _checks.ArgumentError(
            f"`folder` must hold {total} results; got {folder}, where those from {done} on are "
            "missing. Run map_to_disk again, which makes what is not there."
        )
    return np.concatenate(parts)


def _note(folder: Path, index: dict[str, Any]) -> None:
    path = folder / "index.json"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}.partial")
        unfinished.write_text(json.dumps(index))
        os.replace(unfinished, path)
    found = json.loads(path.read_text())
    differing = [name for name, value in index.items() if found.get(name) != value]
    if differing:
        raise _checks.ArgumentError(
            f"`folder` must hold results of the same `xs`, `args` and chunks; in {folder} differ "
            f"{differing}. Choose another."
        )


def _digest(*trees: Any) -> str:
    """Of the arrays and keys."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if _checks.is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if not callable(leaf):
            leaf = np.asarray(leaf)
            digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()


def _rows(xs: Any, first: int, size: int) -> Any:
    """`size` examples from `first` on, the last one over and over where there are no more."""
    rows = jnp.minimum(first + jnp.arange(size), len(jax.tree.leaves(xs)[0]) - 1)
    return jax.tree.map(lambda leaf: leaf[rows], xs)


def _reason(error: Exception) -> str:
    """The message of equinox's, which jit buries in its own; else the whole."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"{error}\nLower `chunk_size`."
    found = [line for line in str(error).splitlines() if "EquinoxRuntimeError: " in line]
    return found[0].split("EquinoxRuntimeError: ")[1] if found else str(error)


def _join(chunks: list) -> Any:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


@jax.jit
def _run(fn: Callable, xs: Any, args: tuple) -> Any:
    return jax.vmap(lambda x: fn(x, *args))(xs)
