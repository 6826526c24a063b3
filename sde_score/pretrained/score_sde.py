"""The checkpoints of score SDE's PyTorch code (Song et al. 2021, arXiv 2011.13456) in our `UNet`.

Every network of `ddpm.py` and `ncsnpp.py`, by the field names of their published configurations.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import SDE, Params, Scalar, ScoreFn, bind
from sde_score.nets.unet import UNet
from sde_score.pretrained._layout import (
    Entry,
    check_named,
    check_same,
    conv_kernel,
    dense_kernel,
    fill,
)
from sde_score.pretrained._torch_file import read_pth
from sde_score.sde import VE, VP, SubVP


class Pretrained(NamedTuple):
    """A published model: `net.apply(params, x, time_input)` on images in `data_range`.

    `score_fn(x, t)` is its score over `sde`, `net_fn(x, time_input)` the published network; both
    take one image (H, W, C) and are pytrees. `shape` is its training images', where known.
    """

    net: UNet
    params: Params
    sde: SDE
    data_range: tuple[float, float]
    score_fn: ScoreFn
    net_fn: Callable[[Array, Scalar], Array]
    shape: tuple[int, ...] | None = None


_TABLES = {  # what a field of the configuration may say
    "name": {"ddpm": True, "ncsnpp": False},
    "resblock_type": {"ddpm": False, "biggan": True},
    "conditional": {True: True},  # no published model lacks the time
    "sde": {"vpsde": VP, "subvpsde": SubVP, "vesde": VE},
    "nonlinearity": {
        **{"swish": nn.swish, "elu": nn.elu, "relu": nn.relu},
        "lrelu": partial(nn.leaky_relu, negative_slope=0.2),
    },
}
_PARTS = {  # what a part of a block is called there
    **{"norm_0": "GroupNorm_0", "conv_0": "Conv_0", "time": "Dense_0"},
    **{"norm_1": "GroupNorm_1", "conv_1": "Conv_1", "norm": "GroupNorm_0"},
    **{"query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"},
}


def load(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    sha256: str | None = None,
    dtype: Any = None,
) -> Pretrained:
    """The model in the checkpoint `path`, with the averaged (EMA) weights it was sampled with.

    `config` has the fields of the published configuration in one dictionary: those of
    `config.model`, image_size, num_channels and centered of `config.data`, sde and continuous of
    `config.training`. `sha256` is the file's, where known; `dtype` the network's, such as
    jnp.bfloat16. A file whose parameters are not those of the configuration is refused.
    """
    try:
        size = config["image_size"]
        _checks.check_count("config['image_size']", size)
        net, sde = _network(config, dtype), _sde(config)
        variables = _variables(read_pth(path, sha256=sha256), net, size, path)
        net_fn = _net_fn(config, net, bind(net.apply, variables))
        data_range = (-1.0, 1.0) if config["centered"] else (0.0, 1.0)
        score_fn = _score_fn(config, sde, net_fn)
    except _checks.ArgumentError:
        raise
    except Exception as error:  # whatever a malformed configuration leads to
        cause = "no field " if isinstance(error, KeyError) else f"{type(error).__name__}: "
        raise _checks.ArgumentError(
            "`config` must be one flat dictionary of the published fields; got "
            f"{list(config) if isinstance(config, dict) else type(config).__name__} "
            f"({cause}{error}). Put those of its parts model, data and training into one."
        ) from error
    shape = (size, size, net.channels)
    return Pretrained(net, variables, sde, data_range, score_fn, net_fn, shape)


def _network(config: Mapping[str, Any], dtype: Any) -> UNet:
    _look_up(config, "conditional")
    resolutions = [config["image_size"] // 2**i for i in range(len(config["ch_mult"]))]
    fields = {
        "width": config["nf"],
        "multipliers": tuple(config["ch_mult"]),
        "num_blocks": config["num_res_blocks"],
        "attention_levels": tuple(
            i for i, size in enumerate(resolutions) if size in config["attn_resolutions"]
        ),
        "channels": config["num_channels"],
        "dropout": config["dropout"],
        "resample_with_conv": config["resamp_with_conv"],
        "recentre": not config["centered"],
        "activation": _look_up(config, "nonlinearity"),
        "dtype": dtype,
    }
    if _look_up(config, "name"):
        return UNet(biggan=False, skip_rescale=False, groups=32, **fields)
    embedding = config["embedding_type"].lower()
    return UNet(
        embedding=embedding,
        scale_by_sigma=config["scale_by_sigma"] and embedding == "fourier",
        biggan=_look_up(config, "resblock_type"),
        skip_rescale=config["skip_rescale"],
        fir_kernel=tuple(config["fir_kernel"]) if config["fir"] else None,
        progressive_input=config["progressive_input"].lower(),
        progressive_output=config["progressive"].lower(),
        combine=config["progressive_combine"].lower(),
        init_scale=config["init_scale"],
        **fields,
    )


def _look_up(config: Mapping[str, Any], field: str) -> Any:
    value = config[field]
    value = value.lower() if isinstance(value, str) else value
    if value not in _TABLES[field]:
        raise _checks.ArgumentError(
            f"`config[{field!r}]` must be one of {list(_TABLES[field])}; got {value!r}. Other "
            "models of the published code are not supported."
        )
    return _TABLES[field][value]


def _sde(config: Mapping[str, Any]) -> SDE:
    """Down to the time 1e-5 that the published training and likelihood use; to the first of the
    steps that a discrete VP was trained on, as below it the score's scale is a constant.
    """
    cls = _look_up(config, "sde")
    names = ("sigma_min", "sigma_max") if cls is VE else ("beta_min", "beta_max")
    low, high = (float(config[name]) for name in names)
    discrete = cls is VP and not config["continuous"]
    t0 = vp_time(low, high, -math.log1p(-low / config["num_scales"])) if discrete else 1e-5
    return cls(low, high, t0=t0)


def vp_time(low: float, high: float, integral: float) -> float:
    """Where the integral of VP's beta is `integral`, by the stable root of its equation."""
    return 2.0 * integral / (low + math.sqrt(low**2 + 2.0 * (high - low) * integral))


def _net_fn(config: Mapping[str, Any], net: UNet, apply: Partial) -> Partial:
    """As published: divided by sigma also where it is given not sigma but its number."""
    if net.scale_by_sigma or not config["scale_by_sigma"]:
        return apply
    top, bottom = np.log(config["sigma_max"]), np.log(config["sigma_min"])
    sigmas = np.exp(np.linspace(top, bottom, config["num_scales"]))
    return bind(_divided, apply, jnp.asarray(sigmas, jnp.float32))


def _divided(net_fn: Callable, sigmas: Array, x: Array, index: Scalar) -> Array:
    return net_fn(x, index) / sigmas[jnp.asarray(index).astype(int)].astype(x.dtype)


def _score_fn(config: Mapping[str, Any], sde: SDE, net_fn: Callable) -> Partial:
    continuous = config["continuous"]
    if isinstance(sde, VE):
        return bind(_ve_score, sde, net_fn, None if continuous else config["num_scales"])
    if continuous or isinstance(sde, SubVP):
        return bind(_vp_score, sde, net_fn, None)
    num = config["num_scales"]
    betas = np.linspace(config["beta_min"] / num, config["beta_max"] / num, num)
    stds = np.sqrt(1.0 - np.cumprod(1.0 - betas))
    return bind(_vp_score, sde, net_fn, jnp.asarray(stds, jnp.float32))


def _ve_score(sde: SDE, net_fn: Callable, num_scales: Scalar | None, x: Array, t: Scalar) -> Array:
    """The network at sigma or, trained on `num_scales` levels, at their number from the top."""
    _checks.check_scalar_time(t, sde)
    if num_scales is None:
        return net_fn(x, sde.sigma(t))
    return net_fn(x, jnp.round((sde.t1 - t) * (num_scales - 1)))


def _vp_score(sde: SDE, net_fn: Callable, stds: Array | None, x: Array, t: Scalar) -> Array:
    """−network/std, where `stds` are those of the steps that it was trained on."""
    _checks.check_scalar_time(t, sde)
    if stds is None:
        return -net_fn(x, 999.0 * t) / sde.sigma(t)
    label = jnp.asarray(t * (len(stds) - 1))
    return -net_fn(x, label) / stds[label.astype(int)].astype(x.dtype)


def _order(net: UNet) -> Iterator[str]:
    """The modules of `net` in the order of the published list."""
    last = len(net.multipliers) - 1
    yield from ["frequencies"] * (net.embedding == "fourier")
    yield from ("embed_0", "embed_1", "input")
    for i in range(last + 1):
        for j in range(net.num_blocks):
            yield f"down_{i}_block_{j}"
            yield from [f"down_{i}_attention_{j}"] * (i in net.attention_levels)
        if i < last:
            yield f"down_{i}_resample"
            yield from [f"down_{i}_pyramid_resample"] * (net.progressive_input == "residual")
            yield from [f"down_{i}_pyramid_combine"] * (net.progressive_input == "input_skip")
    yield from ("mid_block_0", "mid_attention", "mid_block_1")
    for i in range(last, -1, -1):
        yield from (f"up_{i}_block_{j}" for j in range(net.num_blocks + 1))
        yield from [f"up_{i}_attention_{net.num_blocks}"] * (i in net.attention_levels)
        if net.progressive_output == "residual" and i < last:
            yield f"up_{i}_pyramid_resample"
        elif net.progressive_output != "none":
            yield from (f"up_{i}_pyramid_norm", f"up_{i}_pyramid")
        yield from [f"up_{i}_resample"] * (i > 0)
    if net.progressive_output != "output_skip":
        yield from ("output_norm", "output")


def _layout(net: UNet, size: int) -> dict[str, Entry]:
    """What a checkpoint must hold, by its published name; nothing is allocated."""
    x = jax.ShapeDtypeStruct((size, size, net.channels), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.float32(1.0))
    parts = _PARTS | {
        "shortcut": "Conv_2" if net.biggan else "NIN_0",
        "conv": "Conv_0" if net.fir_kernel is None else "Conv2d_0",
    }
    layout = {}
    for index, module in enumerate(_order(net)):
        if module == "frequencies":
            layout[f"all_modules.{index}.W"] = Entry(("constants", module), (net.width,))
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"].get(module, {})):
            *inner, kind = (key.key for key in path)
            part = parts[inner[0]] if inner else "Conv_0" * module.endswith("combine")
            name, *rest = _published(part, kind, leaf.shape)
            name = ".".join(filter(None, ("all_modules", str(index), part, name)))
            layout[name] = Entry(("params", module, *inner, kind), *rest)
    assert len(layout) == len(jax.tree.leaves(shapes))
    return layout


def _published(part: str, kind: str, shape: tuple[int, ...]) -> tuple:
    """A leaf's name and shape in the file, and what makes it ours."""
    if part.startswith("NIN"):
        return {"kernel": "W", "bias": "b"}[kind], shape
    if kind != "kernel":
        return {"scale": "weight", "bias": "bias"}[kind], shape
    if len(shape) == 4:
        return "weight", *conv_kernel(shape)
    return "weight", *dense_kernel(shape, conv=part.startswith("Conv"))


def _variables(file: Any, net: UNet, size: int, path: Any) -> Params:
    """The averages, which the file lists in the order of the model's trainable parameters."""
    try:
        model, averages = file["model"], list(file["ema"]["shadow_params"])
    except (LookupError, TypeError) as error:
        raise _checks.ArgumentError(
            f"`{path}` must hold 'model' and 'ema' with 'shadow_params'; {error} failed. Give a "
            "checkpoint of score SDE's training."
        ) from error
    check_named(path, model, net.num_blocks * len(net.multipliers))
    arrays = {name.removeprefix("module."): array for name, array in model.items()}
    arrays.pop("sigmas", None)
    layout = _layout(net, size)
    check_same(path, arrays, layout)
    names = [name for name in arrays if layout[name].path[0] == "params"]
    if len(averages) != len(names):
        raise _checks.ArgumentError(
            f"`{path}` must have an average of each of its {len(names)} trainable parameters; got "
            f"{len(averages)}. It may be damaged, or of other code."
        )
    arrays |= dict(zip(names, averages, strict=True))
    check_same(path, arrays, layout)
    return fill(path, arrays, layout)
