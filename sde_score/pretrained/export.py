"""A model in one file of our own: safetensors, with networks, SDEs and functions by their names.

The metadata are JSON; only what the tables below name can be made from a file, and nothing is
imported or called for it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sde_score import _checks, parameterization
from sde_score._typing import Params, bind
from sde_score.nets.mlp import MLP
from sde_score.nets.unet import Context, UNet
from sde_score.pretrained import diffusers, score_sde
from sde_score.pretrained._layout import check_named
from sde_score.pretrained._torch_file import open_verified
from sde_score.pretrained.score_sde import Pretrained
from sde_score.sde import VE, VP, SubVP
from sde_score.training.parameters import check_same, load_params, named_leaves, save_params

CLASSES = {cls.__name__: cls for cls in (UNet, MLP, VP, SubVP, VE)}
ACTIVATIONS = {"swish": nn.swish, "relu": nn.relu, "elu": nn.elu, "tanh": nn.tanh, "gelu": nn.gelu}
ACTIVATIONS |= score_sde._TABLES["nonlinearity"]
_MADE = ("score_fn", "net_fn")
FUNCTIONS = {
    function.__name__: function
    for function in (
        parameterization._score_from_noise,
        parameterization._score_from_denoiser,
        parameterization._score_from_velocity,
        parameterization._score_from_preconditioned,
        score_sde._vp_score,
        score_sde._ve_score,
        score_sde._divided,
        diffusers._noise_at_step,
    )
}


def save_pretrained(path: str | os.PathLike, pretrained: Pretrained) -> None:
    """Write a model to one file, all or nothing; `load_pretrained` returns it as it was.

    The network is a `UNet` or `MLP` over VP, sub-VP or VE; `score_fn` and `net_fn` are made of
    its `apply`, `params` and the functions of `sde_score.parameterization`, or come from a loader
    here. The file holds a digest of its arrays and metadata, by which damage is found.
    """
    _checks.check_data("pretrained.params", pretrained.params, _checks.CONVERT)
    arrays: dict[str, Any] = {}
    metadata = {name: _describe(getattr(pretrained, name), pretrained, arrays) for name in _MADE}
    metadata |= {"net": _fields(pretrained.net), "sde": _fields(pretrained.sde)}
    metadata["data_range"] = [float(end) for end in pretrained.data_range]
    metadata["shape"] = pretrained.shape
    tree = {"params": pretrained.params, "arrays": arrays}
    save_params(path, tree, metadata | {"sha256": _digest(tree, metadata)})


def _digest(tree: Params, metadata: Any) -> str:
    """The SHA-256 of arrays, with their names, dtypes and shapes, and of JSON."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, leaf in sorted(named_leaves(tree).items()):
        found.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def load_pretrained(
    path: str | os.PathLike, *, max_bytes: int = 2**32, sha256: str | None = None
) -> Pretrained:
    """The model in a file of `save_pretrained`, exactly; the file, of at most `max_bytes` and of
    that digest where one is given, is not trusted.
    """
    try:
        with open_verified(path, max_bytes, sha256):
            tree, metadata = load_params(path)
        if metadata.pop("sha256") != _digest(tree, metadata):
            raise ValueError("it is damaged: its SHA-256 is not the one that it holds")
        net, sde = _made(metadata["net"]), _made(metadata["sde"])
        got = named_leaves(tree["params"])
        blocks = net.num_blocks * len(net.multipliers) if isinstance(net, UNet) else net.depth
        check_named(path, got, blocks)
        check_same(path, got, _wanted(net, tree["params"]))
        parts = {"net": bind(net.apply, tree["params"]), **tree.get("arrays", {})}
        _checks.check_data(f"{path}", tree["params"], _checks.CONVERT)
        low, high = metadata["data_range"]
        if (shape := metadata["shape"]) is not None:
            shape = tuple(shape)
            _checks.check_event_shape(shape)
        functions = [_restore(metadata[name], parts) for name in _MADE]
    except _checks.ArgumentError:
        raise
    except Exception as error:  # whatever a foreign file leads to
        raise _checks.ArgumentError(
            f"`path` must be a file of save_pretrained; got {os.fspath(path)} "
            f"({type(error).__name__}: {error}). For parameters alone take load_params."
        ) from error
    return Pretrained(net, tree["params"], sde, (low, high), *functions, shape=shape)


def _wanted(net: UNet | MLP, params: Params) -> dict[str, Any]:
    """The names and shapes of the network's parameters, in the file's dtypes."""
    context = None
    if isinstance(net, UNet):
        size = 2 ** (len(net.multipliers) - 1)
        shape = (size, size, net.channels)
        context = Context(label=None if net.num_classes is None else jnp.int32(0))
    else:
        shape = params["params"]["output"]["bias"].shape  # an image's is not known
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), x, jnp.float32(1.0), context)
    got = named_leaves(params)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, got.get(name, leaf).dtype)
        for name, leaf in named_leaves(like).items()
    }


def _describe(value: Any, model: Pretrained, arrays: dict[str, Any]) -> Any:
    """A function as JSON; the arrays that it holds go to `arrays`, under their number."""
    if isinstance(value, Partial):
        if value.func == model.net.apply:
            if jax.tree.all(jax.tree.map(np.array_equal, value.args, (model.params,))):
                return "net"
        name = getattr(value.func, "__name__", "")
        if FUNCTIONS.get(name) is value.func and not value.keywords:
            return {"function": name, "args": [_describe(a, model, arrays) for a in value.args]}
        raise _checks.ArgumentError(
            f"`pretrained` must have functions of its net, its params and {list(FUNCTIONS)}; got "
            f"{name or value.func!r}. Save the parameters of others with save_params."
        )
    if type(value) in (VP, SubVP, VE):
        return _fields(value)
    if value is None or type(value) in (int, float):
        return value
    name = f"{len(arrays)}"
    arrays[name] = jnp.asarray(value)
    return name


def _restore(description: Any, parts: Mapping[str, Any]) -> Any:
    if isinstance(description, dict) and "class" in description:
        return _made(description)
    if isinstance(description, dict):
        args = [_restore(argument, parts) for argument in description["args"]]
        return Partial(FUNCTIONS[description["function"]], *args)
    return parts[description] if isinstance(description, str) else description


def _fields(instance: Any) -> dict[str, Any]:
    """The class's name and its fields as JSON: activations and dtypes by their names."""
    fields = [f.name for f in dataclasses.fields(instance) if f.name not in ("parent", "name")]
    values = {name: getattr(instance, name) for name in fields}
    if "activation" in values:
        names = {function: name for name, function in ACTIVATIONS.items()}
        values["activation"] = names.get(values["activation"])
    name = type(instance).__name__
    if CLASSES.get(name) is not type(instance) or values.get("activation", "") is None:
        raise _checks.ArgumentError(
            f"`pretrained` must have a network and an SDE of {list(CLASSES)}, with activation in "
            f"{list(ACTIVATIONS)}; got {instance}. Save others' parameters with save_params."
        )
    if values.get("dtype") is not None:
        values["dtype"] = jnp.dtype(values["dtype"]).name
    if not isinstance(instance, nn.Module):
        values = {name: float(value) for name, value in values.items()}
    return {"class": name, **values}


def _made(description: dict[str, Any]) -> Any:
    """The instance of `_fields`; its class refuses what is wrong."""
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    if values.get("dtype") is not None:
        values["dtype"] = jnp.dtype(values["dtype"])
    if "activation" in values:
        values["activation"] = ACTIVATIONS[values["activation"]]
    return CLASSES[values.pop("class")](**values)
