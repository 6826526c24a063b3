"""Folders of Hugging Face diffusers in our `UNet`: google/ddpm-*, google/ncsnpp-* and the like.

Neither diffusers nor torch is needed: a folder holds JSON, and safetensors or a .bin file.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import SDE, Params, Scalar, bind
from sde_score.nets.presets import FIR_KERNEL
from sde_score.nets.unet import UNet
from sde_score.parameterization import score_from_noise
from sde_score.pretrained._layout import (
    Entry,
    check_named,
    check_same,
    conv_kernel,
    dense_kernel,
    fill,
)
from sde_score.pretrained._torch_file import read_pth, read_safetensors
from sde_score.pretrained.score_sde import Pretrained, _ve_score, vp_time
from sde_score.sde import VE, VP

# What must be as it is here, where a folder says anything of it: nothing else is published.
FIXED = {"resnet_time_scale_shift": "default", "downsample_type": "conv", "upsample_type": "conv"}
FIXED |= {"mid_block_type": "UNetMidBlock2D", "add_attention": True, "attn_norm_num_groups": None}
FIXED |= {"class_embed_type": None, "num_class_embeds": None, "time_embedding_dim": None}
FIXED |= {"_class_name": "UNet2DModel"}
FIXED_SCHEDULE = {"beta_schedule": "linear", "trained_betas": None, "prediction_type": "epsilon"}
FIXED_SCHEDULE |= {"rescale_betas_zero_snr": False}
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "relu": nn.relu}
# What a module of ours, or a part of one, is called there.
MODULES = {"embed_0": "time_embedding.linear_1", "embed_1": "time_embedding.linear_2"}
MODULES |= {"input": "conv_in", "output_norm": "conv_norm_out", "output": "conv_out"}
MODULES |= {"up_0_pyramid_norm": "conv_norm_out", "up_0_pyramid": "conv_out"}
MODULES |= {"mid_block_0": "mid_block.resnets.0", "mid_block_1": "mid_block.resnets.1"}
MODULES |= {"mid_attention": "mid_block.attentions.0"}
PARTS = {"norm_0": "norm1", "conv_0": "conv1", "norm_1": "norm2", "conv_1": "conv2"}
PARTS |= {"time": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm"}
PARTS |= {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0", "conv": "conv"}
OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(folder: str | os.PathLike, *, sha256: str | None = None, dtype: Any = None) -> Pretrained:
    """The model in a folder of diffusers: the network's own, or the pipeline's with unet/ in it.

    There lie config.json, diffusion_pytorch_model.safetensors (or .bin) and, there or in
    scheduler/ beside it, scheduler_config.json. N steps of DDPM make VP with beta_min =
    N beta_start and beta_max = N beta_end, where `score_fn` gives the network the step, a real
    number, that has the log-SNR of t; sde.t0 has that of the first step. A VE scheduler makes VE,
    and the network is a function of sigma. `sha256` is that of the file with the weights, `dtype`
    the network's. A file whose parameters are not those of the configuration is refused.
    """
    root = Path(folder)
    home = root / "unet" if (root / "unet").is_dir() else root
    weights, read = home / "diffusion_pytorch_model.safetensors", read_safetensors
    if not weights.exists():
        weights, read = weights.with_suffix(".bin"), read_pth
    try:
        config = _read_json(home / "config.json")
        net, shape = _network(config, dtype), config.get("sample_size")
        if shape is not None:
            shape = (*((shape, shape) if isinstance(shape, int) else shape), net.channels)
            _checks.check_event_shape(shape)
        sde, levels = _schedule(_read_json(_scheduler(root, home)), net)
        variables = _variables(read(weights, sha256=sha256), net, weights)
    except _checks.ArgumentError:
        raise
    except Exception as error:  # whatever a foreign configuration leads to
        raise _checks.ArgumentError(
            f"`folder` must hold the configurations of a UNet2DModel and its scheduler; got {root}"
            f" ({type(error).__name__}: {error}). Compare with those of google/ddpm-cifar10-32."
        ) from error
    net_fn = bind(net.apply, variables)
    if isinstance(sde, VE):
        score_fn, data_range = bind(_ve_score, sde, net_fn, None), (0.0, 1.0)
    else:
        noise_fn = bind(_noise_at_step, sde, net_fn, levels)
        score_fn, data_range = score_from_noise(sde, noise_fn), (-1.0, 1.0)
    return Pretrained(net, variables, sde, data_range, score_fn, net_fn, shape)


def _scheduler(root: Path, home: Path) -> Path:
    places = (root / "scheduler", root, home, home.parent / "scheduler")
    paths = [place / "scheduler_config.json" for place in places]
    return next((path for path in paths if path.exists()), paths[0])


def _read_json(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.loads(file.read(2**20))
    except (OSError, ValueError, RecursionError) as error:
        raise _checks.ArgumentError(
            f"`folder` must hold {path.name}; got {path} ({error}). Give the folder of a "
            "UNet2DModel or of its pipeline."
        ) from error


def _require(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if (got := config.get(name, value)) != value:
            raise _checks.ArgumentError(
                f"`{name}` in the folder's configuration must be {value!r}; got {got!r}. "
                "Other models of diffusers are not supported."
            )


def _network(config: Mapping[str, Any], dtype: Any) -> UNet:
    channels, down = config["block_out_channels"], config["down_block_types"]
    skip = "Skip" * ("Skip" in down[0])  # the blocks of NCSN++; the others are DDPM's
    attention = {f"{skip}DownBlock2D": False, f"Attn{skip}DownBlock2D": True}
    attends = [attention[name] for name in down]
    scale, factor = 2**0.5 if skip else 1.0, config["mid_block_scale_factor"]
    multipliers = [c // channels[0] for c in channels]
    expected = {
        "len(down_block_types)": len(channels),
        "up_block_types": [f"{'Attn' * attended}{skip}UpBlock2D" for attended in attends[::-1]],
        "block_out_channels": [m * channels[0] for m in multipliers],
        "out_channels": 3 if skip else config["in_channels"],
        "in_channels": 3 if skip else config["in_channels"],
        "time_embedding_type": "fourier" if skip else "positional",
        "mid_block_scale_factor": factor if math.isclose(factor, scale, rel_tol=1e-6) else scale,
        "norm_num_groups": None if skip else config["norm_num_groups"],
        "center_input_sample": config["center_input_sample"] if skip else False,
    }
    _require({**config, "len(down_block_types)": len(down)}, FIXED | expected)
    if skip and any(c < 128 for c, attended in zip(channels, attends, strict=True) if attended):
        raise _checks.ArgumentError(
            f"`block_out_channels` must be at least 128 where there is attention; got {channels}. "
            "Its groups are 32 whatever the width there, and here min(width/4, 32)."
        )
    return UNet(
        width=channels[0],
        multipliers=tuple(multipliers),
        num_blocks=config["layers_per_block"],
        attention_levels=tuple(i for i, attended in enumerate(attends) if attended),
        channels=config["in_channels"],
        dropout=config.get("dropout", 0.0),
        embedding=config["time_embedding_type"],
        embedding_shift=config["freq_shift"],
        cosine_first=config["flip_sin_to_cos"] and not skip,
        scale_by_sigma=skip != "",
        recentre=config["center_input_sample"],
        biggan=skip != "",
        skip_rescale=skip != "",
        fir_kernel=FIR_KERNEL if skip else None,
        symmetric_padding=config["downsample_padding"] == 1,
        progressive_input="input_skip" if skip else "none",
        progressive_output="output_skip" if skip else "none",
        groups=config["norm_num_groups"],
        norm_epsilon=config["norm_eps"],
        attention_head_dim=config["attention_head_dim"],
        attention_after_every_block=not skip,
        activation=ACTIVATIONS[config["act_fn"]],
        dtype=dtype,
    )


def _schedule(config: Mapping[str, Any], net: UNet) -> tuple[SDE, Array | None]:
    """The SDE, and for VP the integral of beta that has the signal-to-noise ratio of each step."""
    if net.scale_by_sigma:
        _require(config, {"_class_name": "ScoreSdeVeScheduler"})
        return VE(config["sigma_min"], config["sigma_max"], t0=1e-5), None
    _require(config, FIXED_SCHEDULE)
    num, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if not 1 < num <= 100_000:
        raise OverflowError(f"num_train_timesteps of {num}")
    if not (0.0 < low < 1.0 and 0.0 < high < 1.0):
        raise OverflowError(f"beta_start and beta_end of {low} and {high}, not between 0 and 1")
    levels = np.cumsum(-np.log1p(-np.linspace(low, high, num)))  # alpha² = e^−levels
    low, high, first = num * low, num * high, float(levels[0])
    return VP(low, high, t0=vp_time(low, high, first)), jnp.asarray(levels, jnp.float32)


def _noise_at_step(sde: VP, net_fn: Callable, levels: Array, x: Array, t: Scalar) -> Array:
    steps = jnp.arange(len(levels), dtype=levels.dtype)
    return net_fn(x, jnp.interp(sde.int_beta(t), levels, steps))


def _variables(file: Any, net: UNet, path: Path) -> Params:
    check_named(path, file, net.num_blocks * len(net.multipliers))
    parts = ([OLD_PARTS.get(part) or part for part in name.split(".")] for name in file)
    arrays = dict(zip(map(".".join, parts), file.values(), strict=True))
    arrays.pop("time_proj.W", None)  # time_proj.weight again, in files of early versions
    layout = _layout(net)
    check_same(path, arrays, layout)
    return fill(path, arrays, layout)


def _layout(net: UNet) -> dict[str, Entry]:
    """What a file must hold, by its published name; nothing is allocated."""
    size = 2 ** (len(net.multipliers) - 1)
    x = jax.ShapeDtypeStruct((size, size, net.channels), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.float32(1.0))
    layout = {}
    if "constants" in shapes:
        layout["time_proj.weight"] = Entry(("constants", "frequencies"), (net.width,))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        module, *inner, kind = (key.key for key in path)
        name, there = "bias" if kind == "bias" else "weight", (leaf.shape, np.asarray)
        if leaf.ndim == 4:
            there = conv_kernel(leaf.shape)
        elif kind == "kernel":
            conv = "shortcut" in inner or module.endswith("combine")
            there = dense_kernel(leaf.shape, conv=conv)
        name = ".".join([_there(module, net), *(PARTS[part] for part in inner), name])
        layout[name] = Entry(("params", module, *inner, kind), *there)
    return layout


def _there(module: str, net: UNet) -> str:
    """The published name of a module; the way up is numbered from the lowest level there."""
    if module in MODULES:
        return MODULES[module]
    way, level, part, *index = module.split("_")
    number = int(level) if way == "down" else len(net.multipliers) - 1 - int(level)
    once = way == "up" and not net.attention_after_every_block
    last = "".join(index[-1:])
    names = {
        "block": f"resnets.{last}",
        "attention": f"attentions.{0 if once else last}",
        "resample": f"resnet_{way}" if net.biggan else f"{way}samplers.0",
        "pyramid": "skip_norm" if index == ["norm"] else "skip_conv",
    }
    return f"{way}_blocks.{number}.{names[part]}"
