"""`stream`: batches of data that do not fit on the device, read ahead while it works."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from sde_score import _checks
from sde_score.data.tfds import import_extra


def stream(
    source: Sequence[Any],
    seed: int,
    batch_size: int,
    *,
    mesh: Mesh | None = None,
    num_threads: int = 8,
) -> "Stream":
    """The `feed` of `sde_score.training.run.train`.

    `source[i]`, 0 ≤ i < len(source), is a pytree of numpy arrays, as `open_source` gives them. A
    batch is a function of (seed, step): each epoch holds every example once in a new order, and a
    batch may straddle two. Over a `mesh` each batch is cut along the devices, and a process reads
    the examples of its own alone.
    """
    grain = import_extra("grain")
    for name, value in (("num_threads", num_threads), ("batch_size", batch_size)):
        _checks.check_count(name, value)
    _checks.check_count("seed", seed, 0)
    if batch_size > len(source):
        raise _checks.ArgumentError(
            f"`batch_size` must be at most the number of examples, {len(source)}; got "
            f"{batch_size}. Use batch_size={len(source)}."
        )
    if mesh is not None and batch_size % mesh.size:
        raise _checks.ArgumentError(
            f"`batch_size` must be a multiple of the mesh's {mesh.size} devices; got {batch_size}."
        )
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return Stream(order, batch_size, mesh, ThreadPoolExecutor(num_threads))


class Stream:
    """`stream(start, stop)` is the function from step to batch of these steps, on the device.

    While the device works on them the next as many are read: memory holds both.
    """

    def __init__(
        self, order: Sequence[Any], batch_size: int, mesh: Mesh | None, readers: ThreadPoolExecutor
    ) -> None:
        self._order, self._batch_size, self._readers = order, batch_size, readers
        self._rows, self._sharding = range(batch_size), None
        if mesh is not None:  # [steps, examples, ...]
            self._sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
            own = self._sharding.addressable_devices_indices_map((1, batch_size)).values()
            self._rows = sorted({i for index in own if index for i in range(batch_size)[index[1]]})
        self._stacker = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, int], Future] = {}
        self._length = 0

    def __call__(self, start: int, stop: int) -> Partial:
        _checks.check_count("start", start, 0)
        _checks.check_count("stop", stop, start + 1)
        # A shorter last row is padded to the length of the others: their program serves it too.
        self._length = max(self._length, stop - start)
        ahead = self._ahead.pop((start, stop), None) or self._read(start, stop)
        stacks = ahead.result()
        self._ahead = {(stop, 2 * stop - start): self._read(stop, 2 * stop - start)}
        return Partial(_batch, stacks, np.int32(start))

    def close(self) -> None:
        """Stop to read ahead."""
        for pool in (self._stacker, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, start: int, stop: int) -> Future:
        return self._stacker.submit(self._stack, start, stop, self._length)

    def _stack(self, start: int, stop: int, length: int) -> Any:
        batches = list(self._readers.map(self._examples, range(start, stop)))
        batches += batches[-1:] * (length - len(batches))
        return jax.tree.map(lambda *leaves: self._place(np.stack(leaves)), *batches)

    def _examples(self, step: int) -> Any:
        """This process's examples of a batch."""
        examples = [self._order[step * self._batch_size + row] for row in self._rows]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    def _place(self, stack: np.ndarray) -> Any:
        if self._sharding is None:
            return jax.device_put(stack)
        shape = (len(stack), self._batch_size, *stack.shape[2:])
        return jax.make_array_from_process_local_data(self._sharding, stack, shape)


def _batch(stacks: Any, start: Any, step: Any) -> Any:
    return jax.tree.map(lambda stack: stack[step - start], stacks)
