"""What a published file must hold, and its arrays in the places of our parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sde_score import _checks

_MAX_BLOCKS = 1_000
_MAX_BYTES = 2**33


class Entry(NamedTuple):
    """Where an array of the file belongs, its shape there, and what makes it ours."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


def conv_kernel(shape: tuple[int, ...]) -> tuple[tuple[int, ...], Callable]:
    """PyTorch's shape (O, I, H, W) of our convolution kernel (H, W, I, O), and what turns it."""
    height, width, num_in, num_out = shape
    return (num_out, num_in, height, width), lambda w: w.transpose(2, 3, 1, 0)


def dense_kernel(shape: tuple[int, ...], *, conv: bool) -> tuple[tuple[int, ...], Callable]:
    """PyTorch's shape of our dense kernel (I, O), a linear layer's or a 1 × 1 convolution's."""
    there = (shape[1], shape[0], 1, 1) if conv else (shape[1], shape[0])
    return there, lambda w: w.reshape(w.shape[:2]).T


def check_named(path: Any, arrays: Any, num_blocks: int) -> None:
    """A dictionary by names, of as many as blocks or more: before a long search for each."""
    if not isinstance(arrays, dict) or not all(isinstance(name, str) for name in arrays):
        raise _checks.ArgumentError(
            f"`{path}` must hold arrays by their names; got {type(arrays).__name__} of other "
            "things. Give the file with the parameters."
        )
    if num_blocks > min(len(arrays), _MAX_BLOCKS):
        raise _checks.ArgumentError(
            f"`{path}` must hold the parameters of its configuration; got {len(arrays)} arrays "
            f"for {num_blocks} blocks. Compare the two."
        )


def fill(
    path: Any, arrays: Mapping[str, np.ndarray], layout: Mapping[str, Entry]
) -> dict[str, Any]:
    """The variables of a network from the arrays of the file `path`, in float32, finite."""
    num_bytes = sum(4 * math.prod(entry.shape) for entry in layout.values())
    if num_bytes > _MAX_BYTES:  # a small file may hold one array under many names
        raise _checks.ArgumentError(
            f"`{path}` must hold parameters of at most {_MAX_BYTES} bytes in float32; its "
            f"configuration has {num_bytes}."
        )
    variables: dict[str, Any] = {}
    for name, (place, _, convert) in layout.items():
        node = variables
        for part in place[:-1]:
            node = node.setdefault(part, {})
        leaf: Array = jnp.asarray(convert(arrays[name]), jnp.float32)
        _checks.check_data(f"{name} in {path}", leaf)
        node[place[-1]] = leaf
    return variables


def check_same(path: Any, arrays: Mapping[str, np.ndarray], layout: Mapping[str, Entry]) -> None:
    """The names and shapes in the file `path` are those of the layout; all are floating point."""
    differences = [f"{n}: missing, of shape {layout[n].shape}" for n in layout if n not in arrays]
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            differences.append(f"{name}: {type(array).__name__} instead of an array")
        elif name not in layout:
            differences.append(f"{name}: unexpected, of shape {array.shape}")
        elif array.shape != layout[name].shape:
            want = layout[name].shape
            differences.append(f"{name}: shape {array.shape} instead of {want}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            differences.append(f"{name}: {array.dtype} instead of floating point")
    if differences:
        shown = "\n  ".join(differences[:5])
        raise _checks.ArgumentError(
            f"`{path}` must hold the parameters of its configuration; {len(differences)} differ:"
            f"\n  {shown}\nGive the configuration that it was trained with."
        )
