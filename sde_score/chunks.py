"""More examples than memory holds: a function of one example over many, a chunk at a time."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

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
    fn: Callable, xs: Any, *args: Any, chunk_size: int, progress: Progress | None = None
) -> Any:
    """numpy arrays of fn(x_i, *args) for each x_i along the leading axis of the pytree `xs`,
    `chunk_size` at a time on the device.

    With keys for `xs`, fn = lambda key, s: sample_ode(key, s, sde, shape) and args = (s,) it draws
    samples: sample i is a function of key i, so the noise is the same bit for bit whatever the
    chunk, and the samples are up to the order of sums, which for adaptive steps means up to their
    tolerance. Compiled once for each fn, as the last chunk is filled up. Where a chunk fails, by
    a solve that exhausts its steps, say, the `ChunkError` keeps the finished ones.
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
    start, chunks = time.perf_counter(), []
    for first in range(0, total, chunk_size):
        rows = jnp.minimum(first + jnp.arange(min(chunk_size, total)), total - 1)
        done = min(first + chunk_size, total)
        try:
            values = _run(fn, jax.tree.map(lambda leaf, rows=rows: leaf[rows], xs), args)
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
    progress: Progress | None = None,
) -> Path:
    """`map_in_chunks` of an array-valued fn into folder/FIRST.npy, a file for each chunk, named by
    its first index and whole or not there: those that are there are not made again. Each of
    several processes makes every P-th. `load_chunks` reads them.
    """
    _checks.check_count("chunk_size", chunk_size)
    folder, total = Path(folder), len(jax.tree.leaves(xs)[0])
    folder.mkdir(parents=True, exist_ok=True)
    firsts = range(0, total, chunk_size)[jax.process_index() :: jax.process_count()]
    start = time.perf_counter()
    for first in firsts:
        path, last = folder / f"{first:09d}.npy", min(first + chunk_size, total)
        if not path.exists():
            rows = jnp.minimum(first + jnp.arange(chunk_size), total - 1)  # one compilation
            part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], xs)
            values = map_in_chunks(fn, part, *args, chunk_size=chunk_size)[: last - first]
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, values)
            os.replace(partial, path)
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


def _reason(error: Exception) -> str:
    """The message of equinox's, which jit buries in its own; else the whole."""
    found = [line for line in str(error).splitlines() if "EquinoxRuntimeError: " in line]
    return found[0].split("EquinoxRuntimeError: ")[1] if found else str(error)


def _join(chunks: list) -> Any:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


@jax.jit
def _run(fn: Callable, xs: Any, args: tuple) -> Any:
    return jax.vmap(lambda x: fn(x, *args))(xs)
