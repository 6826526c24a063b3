"""A published model: samples by the predictor–corrector it was published with and by a fast solver
of its flow, and the likelihood of given images.

--checkpoint is a .pth file of score SDE with its --config in JSON, a folder of diffusers, or a
file of `save_pretrained`. --images, an .npy or .npz file of uint8 [n, H, W, C], adds their bits
per dimension. Writes samples.png, metrics.json and config.json.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

import sde_score as ss
from experiments._run import Metrics, check_numbers, cli, estimate, results_folder, write_json
from sde_score import plots, pretrained


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    checkpoint: Path | None = None
    config: Path | None = None  # the published configuration of a .pth file
    sha256: str | None = None  # of the weights, to be verified
    images: Path | None = None
    image_size: int | None = None  # of the samples; None: the checkpoint's own
    num_samples: int = 16
    num_steps: int = 1000  # of the predictor, each after a step of the corrector
    snr: float = 0.16  # of the corrector, as published for CIFAR-10
    fast_steps: int = 20
    start: float = 1e-3  # t0 of the samplers, as published for VP and sub-VP
    num_probes: int = 1
    num_passes: int = 1  # over the images
    tolerance: float = 1e-5  # of the likelihood's solves
    chunk_size: int = 16  # examples at a time on the device
    seed: int = 0
    out: Path = Path("runs/pretrained")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))


QUICK = Config(num_samples=4, num_steps=20, fast_steps=8, tolerance=1e-3, chunk_size=4)


def main(config: Config) -> Metrics:
    """Load, sample, evaluate; returns the metrics that it writes."""
    start = time.perf_counter()
    model = _load(config)
    shape = _shape(config, model)
    images = None if config.images is None else _read(config.images, shape)
    with results_folder(config.out, config) as folder:
        key, sample_key = jax.random.split(jax.random.key(config.seed))
        grids, metrics = _draw(sample_key, config, model, shape)
        if images is not None:
            metrics |= _likelihood(key, config, model, images)
            grids["given images"] = model.data_range[0] + np.ptp(model.data_range) * (
                images[: config.num_samples] / 255
            )
        metrics["total_seconds"] = time.perf_counter() - start
        figure, axes = plt.subplots(1, len(grids), figsize=(4.5 * len(grids), 4.8))
        for ax, (title, x) in zip(axes, grids.items(), strict=True):
            plots.image_grid(x, value_range=model.data_range, ax=ax).set_title(title)
        plots.save(figure, folder / "samples.png")
        write_json(folder / "metrics.json", metrics)
    return metrics


def _load(config: Config) -> pretrained.Pretrained:
    path = config.checkpoint
    if path is None or not path.exists():
        raise ValueError(
            f"`checkpoint` must be a file or folder; got {path}. Give one with --checkpoint."
        )
    if path.is_dir():
        return pretrained.diffusers.load(path, sha256=config.sha256)
    if path.suffix == ".safetensors":
        return pretrained.load_pretrained(path, sha256=config.sha256)
    if config.config is None:
        raise ValueError(f"`config` must be given with {path}: the published one as JSON.")
    fields = json.loads(config.config.read_text(encoding="utf-8"))
    return pretrained.score_sde.load(path, fields, sha256=config.sha256)


def _shape(config: Config, model: pretrained.Pretrained) -> tuple[int, ...]:
    """Of one image."""
    if config.image_size is not None and isinstance(model.net, ss.nets.UNet):
        return config.image_size, config.image_size, model.net.channels
    if model.shape is None:
        raise ValueError("`image_size` must be given: this checkpoint has none. See --image-size.")
    return model.shape


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Of an .npz file the first array."""
    found = np.load(path, allow_pickle=False)
    images = found if isinstance(found, np.ndarray) else found[found.files[0]]
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < 2:
        raise ValueError(
            "`images` must be uint8 [n, H, W, C] with at least 2 examples; got "
            f"{images.dtype}{list(images.shape)}."
        )
    if images.shape[1:] != shape:
        raise ValueError(
            f"`images` must be of the shape of the model's, {shape}; got {images.shape[1:]}. "
            "Resize them, or give another --image-size."
        )
    return images


def _draw(
    key: ss.Key, config: Config, model: pretrained.Pretrained, shape: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], Metrics]:
    """Samples of both samplers from the same draws of the prior, and what they cost."""
    sde = dataclasses.replace(model.sde, t0=max(config.start, model.sde.t0))
    pair = ss.predictor_corrector(ss.reverse_diffusion, ss.langevin(config.snr))
    spread = 0.25 * float(np.ptp(model.data_range))  # about the images' standard deviation

    def corrected(key: ss.Key, score_fn: Partial, sde: ss.SDE) -> Array:
        ts = ss.uniform_grid(sde, config.num_steps)
        return ss.sample(key, score_fn, sde, shape, step=pair, ts=ts)

    def fast(key: ss.Key, score_fn: Partial, sde: ss.SDE) -> Array:
        method, ts = ss.adams(sigma_data=spread), ss.log_snr_grid(sde, config.fast_steps)
        return ss.sample_multistep(key, score_fn, sde, shape, method=method, ts=ts)

    keys, grids, metrics = jax.random.split(key, config.num_samples), {}, {}
    for name, one, evaluations in (
        ("predictor_corrector", corrected, 2 * config.num_steps + 1),
        ("fast", fast, config.fast_steps + 1),
    ):
        start = time.perf_counter()
        size = min(config.chunk_size, len(keys))
        x = ss.map_in_chunks(Partial(one), keys, model.score_fn, sde, chunk_size=size)
        grids[f"{name.replace('_', '–')}, {evaluations} evaluations"] = x
        metrics |= {f"{name}_mean": float(x.mean()), f"{name}_std": float(x.std())}
        metrics[f"{name}_evaluations"] = evaluations
        metrics[f"{name}_seconds"] = time.perf_counter() - start
    return grids, metrics


def _likelihood(
    key: ss.Key, config: Config, model: pretrained.Pretrained, images: np.ndarray
) -> Metrics:
    levels = {"num_levels": 256, "data_range": model.data_range}
    out = ss.dataset_log_likelihood(
        *(key, model.score_fn, model.sde, images),
        dequantize=Partial(ss.uniform_dequantize, **levels),
        num_probes=config.num_probes,
        num_passes=config.num_passes,
        rtol=config.tolerance,
        atol=config.tolerance,
        chunk_size=config.chunk_size,
    )
    dims = images[0].size
    terms = {
        f"{name}_term": value / (dims * np.log(2.0))
        for name, value in out.budget._asdict().items()
        if np.isfinite(value)
    }
    bits = [float(ss.bits_per_dim(log_prob, dims, **levels)) for log_prob in out.log_probs]
    return estimate("bits_per_dim", bits) | terms | {"num_evals": out.num_evals}


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
