"""Parameters in safetensors files, with JSON metadata: no code runs when one is read."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from sde_score import _checks
from sde_score._typing import Params

_SEPARATOR = "/"


def save_params(path: str | os.PathLike, params: Params, metadata: Any = None) -> None:
    """Write a pytree of arrays and JSON metadata to `path`, all or nothing: a crash leaves the old
    file.
    """
    path = Path(path)
    tensors = {name: jnp.asarray(leaf) for name, leaf in named_leaves(params).items()}
    text = json.dumps(metadata)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"json": text})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise _checks.ArgumentError(
            f"`path` must be a file that can be written; got {path} ({error}). Choose another."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load_params(path: str | os.PathLike, like: Params = None) -> tuple[Params, Any]:
    """(parameters, metadata) from a file of `save_params`.

    `like`, a pytree of arrays or of `jax.ShapeDtypeStruct`, gives the structure, whose names,
    shapes and dtypes must be the file's; without it nested dictionaries are returned.
    """
    try:
        with safe_open(path, framework="flax") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get("json", "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _checks.ArgumentError(
            f"`path` must be a safetensors file; got {path} ({error}). Write one with save_params."
        ) from error
    if like is None:
        return _nested(tensors), metadata
    wanted = named_leaves(like)
    check_same(path, tensors, wanted)
    leaves = [tensors[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), metadata


def named_leaves(tree: Params) -> dict[str, Any]:
    """The arrays of a tree by their names in a file."""
    leaves, _ = tree_flatten_with_path(tree)
    named = {keystr(path, simple=True, separator=_SEPARATOR): leaf for path, leaf in leaves}
    depths = [name.count(_SEPARATOR) + 1 for name in named]
    if depths != [len(path) for path, _ in leaves]:
        raise _checks.ArgumentError(
            "`params` must be a container whose leaves have distinct names without a "
            f"{_SEPARATOR!r}, such as a dictionary; got leaves named {list(named)[:5]}."
        )
    return named


def _nested(tensors: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = name.split(_SEPARATOR)
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    return root


def check_same(path: str | os.PathLike, got: dict[str, Any], want: dict[str, Any]) -> None:
    """The arrays of the file `path` have the names, shapes and dtypes that are wanted."""
    differences = [f"{name}: missing" for name in want.keys() - got.keys()]
    differences += [f"{name}: unexpected" for name in got.keys() - want.keys()]
    for name in sorted(want.keys() & got.keys()):
        here, there = (f"{np.dtype(a.dtype)}{list(a.shape)}" for a in (want[name], got[name]))
        if here != there:
            differences.append(f"{name}: {there} instead of {here}")
    if differences:
        shown = "\n  ".join(sorted(differences)[:5])
        raise _checks.ArgumentError(
            f"`{path}` must hold the parameters of `like`; {len(differences)} differ:\n  {shown}\n"
            "Build the network with the configuration stored in the file's metadata."
        )
