"""One training step on many devices: arrays are placed, the program stays as it is.

Under `jax.jit` a step computes with whatever placement its arguments have, and the compiler adds
the communication: placing the batch along one axis of devices is data parallelism, placing the
parameters along it too is parameter sharding (Rajbhandari et al. 2020, arXiv 1910.02054). Several
processes call `jax.distributed.initialize()` first and then run the same program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from sde_score import _checks
from sde_score._typing import travelling

_AXIS = "devices"


def make_mesh(num_devices: int | None = None, *, local: bool = False) -> Mesh:
    """The first `num_devices` devices in a row, or all: of all processes or, with `local`, of this
    one.
    """
    devices = jax.local_devices() if local else jax.devices()
    num = len(devices) if num_devices is None else num_devices
    _checks.check_count("num_devices", num)
    if num > len(devices):
        raise _checks.ArgumentError(
            f"`num_devices` must be at most {len(devices)}, the devices there are; got {num}."
        )
    return Mesh(np.array(devices[:num]), (_AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_params(tree: Any, mesh: Mesh) -> Any:
    """Every array cut along its longest axis that the number of devices divides; scalars and
    others whole. `init_train_state` and `train` of such parameters shard average and moments too.
    """

    def place(leaf: Any) -> Any:
        axes = [(size, axis) for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        cut = [None] * leaf.ndim
        if axes:
            cut[max(axes)[1]] = _AXIS
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*cut)))

    return jax.tree.map(place, tree)


def shard_batches(batches: Callable, mesh: Mesh) -> Partial:
    """`batches` with every batch cut along its first axis, the same examples in the same order
    whatever the number of devices, which must divide the batch.
    """
    return Partial(_Cut(NamedSharding(mesh, PartitionSpec(_AXIS))), travelling(batches))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A function that is equal to another of the same sharding: one compilation."""

    sharding: NamedSharding

    def __call__(self, batches: Callable, step: Any) -> Any:
        return jax.tree.map(self._cut, batches(step))

    def _cut(self, leaf: Any) -> Any:
        if len(leaf) % self.sharding.num_devices:
            raise _checks.ArgumentError(
                f"`batches` must make batches that {self.sharding.num_devices} devices divide; "
                f"got {len(leaf)} examples. Take another batch size or fewer devices."
            )
        return jax.lax.with_sharding_constraint(leaf, self.sharding)
