"""Networks of diffusers in small: configurations, weights from their names, and what they return.

`python tests/pretrained/diffusers_references.py` writes tests/data/diffusers.* again: it needs
the extra `compare` (torch 2.13, diffusers 0.42).
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "data"
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
DDPM |= {"beta_start": 0.0001, "beta_end": 0.02, "trained_betas": None, "clip_sample": True}
VE = {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "snr": 0.075}
VE |= {"sigma_min": 0.01, "sigma_max": 348.0, "sampling_eps": 1e-05}


def config(channels, attention, layers, skip="", **options):
    """That of google/ddpm-* (or, with Skip blocks, google/ncsnpp-*) but for depth and width."""
    levels = range(len(channels))
    kinds = {way: f"{skip}{way}Block2D" for way in ("Down", "Up")}
    name = lambda way, i: "Attn" * (i in attention) + kinds[way]
    return {
        **{"_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None},
        **{"block_out_channels": list(channels), "center_input_sample": False},
        **{"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3},
        **{"layers_per_block": layers, "mid_block_scale_factor": 2**0.5 if skip else 1},
        **{"norm_eps": 1e-6, "norm_num_groups": None if skip else 32, "out_channels": 3},
        **{"sample_size": 32, "time_embedding_type": "fourier" if skip else "positional"},
        "down_block_types": [name("Down", i) for i in levels],
        "up_block_types": [name("Up", i) for i in reversed(levels)],
        **options,
    }


SKIP = {"skip": "Skip", "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1}
MODERN = {"attention_head_dim": 8, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}
MODERN |= {"downsample_padding": 1, "dropout": 0.1}
EPSILON = DDPM | {"prediction_type": "epsilon", "thresholding": False}
STORED = {
    "ddpm": (config((32, 64, 64), {1}, 1), DDPM, (16, 8), (3.0, 876.0)),
    "modern": (config((32, 64), {0, 1}, 1, **MODERN), EPSILON, (4, 8), (0.0, 999.0)),
    "ncsnpp": (config((64, 128), {1}, 1, **SKIP), VE, (8, 4), (0.37, 21.0)),
}
WHOLE = {  # the published depths
    "cifar10-32": (config((32, 64, 64, 64), {1}, 2), DDPM, (16, 16), (3.0, 876.0)),
    "celebahq-256": (config((32, 32, 64, 64, 96, 96), {4}, 2), DDPM, (32, 32), (3.0, 876.0)),
    "ncsnpp-256": (config((64, 64, *[128] * 5), {4}, 2, **SKIP), VE, (64, 64), (0.37, 21.0)),
}


def weights(shapes):
    """Arrays of order 1/sqrt(fan-in), drawn anew from each name: nothing need be stored."""
    arrays = {}
    for name, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(name.encode()))  # noqa: NPY002 (never changes)
        noise = draw.standard_normal(shape)
        if name == "time_proj.weight":
            noise *= 16.0
        elif len(shape) > 1:
            noise /= np.prod(shape[1:]) ** 0.5
        else:
            noise = noise / 10 + ("norm" in name and name.endswith("weight"))
        arrays[name] = noise.astype(np.float32)
    return arrays


def evaluate(config, size, times):
    """(shapes, x, output) of the UNet2DModel with those weights; NCHW."""
    import torch
    from diffusers import UNet2DModel

    net = UNet2DModel(**config).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    arrays = weights(shapes)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    draw = np.random.RandomState(0)  # noqa: NPY002
    x = draw.standard_normal((len(times), 3, *size)).astype(np.float32)
    with torch.no_grad():
        out = net(torch.from_numpy(x), torch.tensor(times)).sample.numpy()
    # safetensors writes an array's memory as it lies
    return shapes, x, np.ascontiguousarray(out)


def main():
    from diffusers import DDPMScheduler

    described, arrays = {}, {}
    for kind, (settings, scheduler, size, times) in STORED.items():
        shapes, x, out = evaluate(settings, size, times)
        described[kind] = {"config": settings, "scheduler": scheduler, "shapes": shapes}
        arrays |= {f"{kind}.x": x, f"{kind}.out": out, f"{kind}.times": np.float32(times)}
    alphas = DDPMScheduler(**{k: v for k, v in DDPM.items() if k[0] != "_"}).alphas_cumprod
    arrays["alphas_cumprod"] = alphas.numpy()
    (DATA / "diffusers.json").write_text(json.dumps(described))
    save_file(arrays, DATA / "diffusers.safetensors")


if __name__ == "__main__":
    main()
