"""Handwritten digits: train a score model, draw samples, and measure its likelihood against
Gaussian mixtures.

Data: scikit-learn's 8×8 digits, 1500 to train and 297 held out, with 17 grey levels, dequantised
uniformly to [-1, 1]. Writes samples.png, loss.png, metrics.json, config.json and the averaged
parameters, score.safetensors.
"""

import dataclasses
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

import sde_score as ss
from experiments._run import (
    Metrics,
    as_dict,
    check_limits,
    check_numbers,
    cli,
    estimate,
    results_folder,
    write_json,
)
from sde_score import plots

LEVELS = 17
DIMS = 64
SDE = ss.VP()
LEVELS_OF_DATA = {"num_levels": LEVELS, "data_range": (-1.0, 1.0)}
to_model = partial(ss.uniform_dequantize, **LEVELS_OF_DATA)  # (key, 0 … 16) -> [-1, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    net: Literal["mlp", "unet"] = "mlp"
    width: int = 256
    depth: int = 3
    unet_width: int = 16  # and the next two are the U-Net's, for as long a training
    unet_steps: int = 2500
    unet_batch_size: int = 64
    dropout: float = 0.1
    smoothing: float = 0.01  # the share of training pixels that become a random grey level
    sigma_data: float = 0.55  # the data's standard deviation
    num_steps: int = 8000
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    ema_decay: float = 0.999
    num_probes: int = 4
    num_dequantisations: int = 2  # passes over the held-out digits
    num_test: int = 297  # held-out digits to evaluate
    num_samples: int = 1500
    mixture_components: tuple[int, ...] = (5, 10, 15)
    mixture_floors: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # added to the variances
    seed: int = 0
    params: Path | None = None  # a score.safetensors to evaluate instead of training
    out: Path = Path("runs/digits")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed", "dropout", "smoothing", "weight_decay"))
        limits = {"num_test": (10, 297), "num_samples": (10, 10**6), "num_probes": (2, 1000)}
        check_limits(self, **limits, dropout=(0, 0.99), smoothing=(0, 1))
        if not self.mixture_components or min(self.mixture_components) < 1:
            raise ValueError(
                "`mixture_components` must hold numbers of components, each at least 1; got "
                f"{self.mixture_components}. Give some, such as 5 10."
            )


QUICK = Config(
    num_steps=300,
    unet_steps=100,
    num_probes=2,
    num_dequantisations=1,
    num_test=100,
    num_samples=200,
    mixture_components=(10,),
    mixture_floors=(1e-3,),
)


def main(config: Config) -> Metrics:
    """Train, sample, evaluate, compare; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        train, test = ss.data.digits()
        real = test.images[: config.num_test]
        keys = iter(jax.random.split(jax.random.key(config.seed), 8))
        net = make_net(config)
        params, losses, train_seconds = train_score(next(keys), config, net, train)
        score_fn = bounded(make_score(net, config, params))
        data_key, probe_key = jax.random.split(next(keys))
        passes = [
            to_model(k, real) for k in jax.random.split(data_key, config.num_dequantisations)
        ]
        bits, metrics = _likelihood(probe_key, config, score_fn, real)
        mixture, mixture_bits = _best_mixture(next(keys), config, train.images, passes)
        metrics |= estimate("bits_per_dim", bits) | estimate("gmm_bits_per_dim", mixture_bits)
        metrics |= estimate("bits_below_gmm", mixture_bits - bits)
        metrics["gmm_components"] = mixture.n_components
        samples = _draw(next(keys), score_fn, config.num_samples)
        mixture_samples = to_levels(mixture.sample(config.num_samples)[0].reshape(-1, 8, 8, 1))
        for name, images in (("", samples), ("gmm_", mixture_samples), ("train_", train.images)):
            metrics |= _two_sample(name, images, real)
        _plot(folder, samples, real, losses)
        ss.save_params(folder / "score.safetensors", params, as_dict(config))
        metrics |= {"train_seconds": train_seconds, "total_seconds": time.perf_counter() - start}
        write_json(folder / "metrics.json", metrics)
    return metrics


def to_levels(x: Array) -> Array:
    """Values in [-1, 1) back to the integers whose bin they lie in."""
    return jnp.clip(jnp.floor(0.5 * LEVELS * (jnp.asarray(x) + 1.0)), 0, LEVELS - 1)


def smooth(key: ss.Key, levels: Array, probability: float) -> Array:
    """Replace each pixel by a random grey level with a small probability, as in Laplace's rule.

    Many pixels of the border are 0 in all training images; without this, the model gives a
    held-out image that lights one of them a likelihood of almost nothing.
    """
    where_key, level_key = jax.random.split(key)
    random = jax.random.randint(level_key, levels.shape, 0, LEVELS, levels.dtype)
    return jnp.where(jax.random.bernoulli(where_key, probability, levels.shape), random, levels)


class AtLevel(nn.Module):
    """A U-Net of c_noise, which grows a hundred times: its embedding expects 0 to 1000."""

    net: ss.nets.UNet

    def __call__(self, x: Array, c_noise: Array, dropout_key: ss.Key | None = None) -> Array:
        return self.net(x, 100.0 * c_noise, dropout_key)


def make_net(config: Config) -> nn.Module:
    if config.net == "mlp":
        return ss.nets.MLP(config.width, config.depth, config.dropout)
    fields = {"multipliers": (1, 2), "num_blocks": 1, "attention_levels": (), "channels": 1}
    return AtLevel(ss.nets.UNet(config.unet_width, dropout=config.dropout, **fields))


def make_score(net: nn.Module, config: Config, params: ss.Params) -> Partial:
    return ss.score_from_preconditioned(
        SDE, Partial(net.apply, params), sigma_data=config.sigma_data
    )


def bounded(score_fn: Partial) -> Partial:
    """The score whose E[x_0 | x_t] is clipped to [−1.5, 1.5]; the data lie in [−1, 1].

    Without it a trained network's flow diverges for one draw of the prior in two thousand, where
    no data have been.
    """
    return Partial(_bounded, score_fn)


def _bounded(score_fn: Partial, x: Array, t: Array) -> Array:
    score, alpha, variance = score_fn(x, t), SDE.alpha(t), SDE.sigma(t) ** 2
    x0 = (x + variance * score) / alpha
    return score - alpha * (x0 - jnp.clip(x0, -1.5, 1.5)) / variance


def make_optimizer(
    learning_rate: float, num_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a short warm-up and a cosine's decay to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 50, num_steps)
    adam = optax.adamw(schedule, b2=0.99, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def train_score(key: ss.Key, config: Config, net: nn.Module, train: ss.data.Examples) -> tuple:
    init_key, batch_key, fit_key = jax.random.split(key, 3)
    num_steps, batch_size, scanned = config.num_steps, config.batch_size, 100
    if config.net == "unet":
        num_steps, batch_size = config.unet_steps, config.unet_batch_size
        scanned = 1 if jax.default_backend() == "cpu" else 100  # convolutions in loops are slow

    def loss(params: ss.Params, key: ss.Key, batch: ss.data.Examples) -> Array:
        smoothing_key, data_key, dropout_key, loss_key = jax.random.split(key, 4)
        x0 = to_model(data_key, smooth(smoothing_key, batch.images, config.smoothing))
        return ss.dsm_loss(
            loss_key,
            make_score(net, config, params),
            SDE,
            x0,
            context=jax.random.split(dropout_key, len(x0)),
            weight=ss.likelihood_weight,
            times=ss.likelihood_times,
        )

    optimizer = make_optimizer(config.learning_rate, num_steps, config.weight_decay)
    params = net.init(init_key, jnp.zeros((8, 8, 1)), 0.0)
    if config.params is not None:
        return ss.load_params(config.params, like=params)[0], None, 0.0
    batches = ss.data.batches(batch_key, train, batch_size)
    start = time.perf_counter()
    state, losses = ss.fit(
        fit_key,
        loss,
        params,
        optimizer,
        batches,
        num_steps=num_steps,
        ema_decay=config.ema_decay,
        steps_per_dispatch=scanned,
    )
    return state.ema_params, losses, time.perf_counter() - start


def _likelihood(
    key: ss.Key, config: Config, score_fn: Partial, levels: Array
) -> tuple[Array, Metrics]:
    """Bits per dimension of each held-out digit, a mean over dequantisations, and the errors."""
    out = ss.dataset_log_likelihood(
        key,
        score_fn,
        SDE,
        levels,
        dequantize=to_model,
        num_probes=config.num_probes,
        num_passes=config.num_dequantisations,
    )
    errors = {
        f"{name}_term": value / (DIMS * np.log(2.0))
        for name, value in out.budget._asdict().items()
        if np.isfinite(value)  # one probe or pass tells nothing of its error
    }
    return bits(jnp.asarray(out.log_probs)), errors | {"num_evals": out.num_evals}


def bits(log_prob: Array) -> Array:
    return ss.bits_per_dim(log_prob, DIMS, **LEVELS_OF_DATA)


def _best_mixture(
    key: ss.Key, config: Config, train: Array, passes: list[Array]
) -> tuple[GaussianMixture, Array]:
    """scikit-learn's full-covariance mixture with the best held-out bits/dim, and these.

    It is fitted to four dequantisations of the training digits; its size and regularisation are
    chosen on the held-out digits themselves, which flatters it.
    """
    as_table = lambda x: np.asarray(x, np.float64).reshape(-1, DIMS)
    x = np.concatenate([as_table(to_model(k, train)) for k in jax.random.split(key, 4)])
    best, best_bits = None, jnp.array(jnp.inf)
    for components, floor in itertools.product(config.mixture_components, config.mixture_floors):
        model = GaussianMixture(components, reg_covar=floor, random_state=config.seed)
        with threadpool_limits(1):  # small matrices: threads that spin cost ten times the work
            model.fit(x)
        log_prob = np.mean([model.score_samples(as_table(x0)) for x0 in passes], axis=0)
        if bits(jnp.asarray(log_prob)).mean() < best_bits.mean():
            best, best_bits = model, bits(jnp.asarray(log_prob))
    return best, best_bits


def _draw(key: ss.Key, score_fn: Partial, num: int) -> Array:
    """Samples of the probability flow, as grey levels."""
    draw = jax.jit(lambda s, keys: jax.vmap(lambda k: ss.sample_ode(k, s, SDE, (8, 8, 1)))(keys))
    return to_levels(draw(score_fn, jax.random.split(key, num)))


def _two_sample(name: str, images: Array, real: Array) -> Metrics:
    """Distances of grey-level images to held-out ones: each metric and its standard error."""
    images, real = (x.astype(jnp.float32) for x in (images, real))
    estimates = {
        "mmd": ss.metrics.mmd(images, real, bandwidth=24.0),
        "energy_distance": ss.metrics.energy_distance(images, real),
        "c2st": ss.metrics.c2st(images, real),
    }
    values = {name + key: float(estimate.value) for key, estimate in estimates.items()}
    return values | {f"{name}{key}_stderr": float(e.stderr) for key, e in estimates.items()}


def _plot(folder: Path, samples: Array, real: Array, losses: np.ndarray | None) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    for ax, title, images in zip(
        axes, ("samples", "held-out digits"), (samples, real), strict=True
    ):
        plots.image_grid(images[:100], columns=10, value_range=(0, LEVELS - 1), ax=ax)
        ax.set_title(title)
    plots.save(figure, folder / "samples.png")
    if losses is not None:
        plots.save(plots.loss_curve(losses).figure, folder / "loss.png")


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
