"""More examples than memory holds: a function of one example over many, a chunk at a time."""

import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sde_score import _checks
from sde_score._typing import travelling

Progress: TypeAlias = Callable[[int, int, float], None]
"""`progress(done, total, seconds)`, after each chunk."""


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
    chunk, and the samples are up to the order of sums. Compiled once for each fn, as the last
    chunk is filled up.
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
        values = _run(fn, jax.tree.map(lambda leaf, rows=rows: leaf[rows], xs), args)
        done = min(first + chunk_size, total)
        chunks.append(jax.tree.map(lambda leaf, n=done - first: np.asarray(leaf)[:n], values))
        if progress is not None:
            progress(done, total, time.perf_counter() - start)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


@jax.jit
def _run(fn: Callable, xs: Any, args: tuple) -> Any:
    return jax.vmap(lambda x: fn(x, *args))(xs)
