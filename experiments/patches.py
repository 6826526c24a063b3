"""Natural images: train a U-Net on patches of photographs, draw samples, and measure its
likelihood beside a Gaussian mixture's.

Data: 32 × 32 colour patches of scikit-learn's two photographs, cut from other columns to train
than to test, dequantised uniformly to [-1, 1]. Writes samples.png, loss.png, metrics.json,
config.json and the averaged parameters, score.safetensors.
"""

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from scipy.fft import dctn
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

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
from experiments.digits import AtLevel
from sde_score import plots

SHAPE = (32, 32, 3)
DIMS = 3072
LEVELS = {"num_levels": 256, "data_range": (-1.0, 1.0)}
to_model = partial(ss.uniform_dequantize, **LEVELS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    sde: ss.VP | ss.SubVP = ss.VP()
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    num_blocks: int = 1
    fold: int = 2  # squares of so many pixels become channels: less work at full resolution
    dropout: float = 0.0
    stride: int = 6  # between training patches, in pixels
    sigma_data: float = 0.66  # the data's standard deviation
    num_steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    num_test: int = 16  # held-out patches for the score model, of 104 for the mixture
    num_probes: int = 1
    tolerance: float = 1e-4  # of the likelihood's solves
    num_samples: int = 36
    sample_steps: int = 20
    mixture_components: tuple[int, ...] = (1, 8, 16)
    mixture_floor: float = 1e-5  # added to the variances, of which dequantisation gives 5e-6
    seed: int = 0
    params: Path | None = None  # a score.safetensors to evaluate instead of training
    out: Path = Path("runs/patches")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed", "dropout"))
        check_limits(self, num_test=(4, 104))
        if SHAPE[0] % (self.fold * 2 ** (len(self.multipliers) - 1)):
            raise ValueError(
                f"`fold` times two to the number of halvings must divide {SHAPE[0]}; got "
                f"{self.fold} with {len(self.multipliers)} levels. Give another --fold."
            )


QUICK = Config(
    width=16,
    fold=4,
    stride=12,
    num_steps=60,
    num_test=4,
    tolerance=1e-3,
    num_samples=9,
    sample_steps=10,
    mixture_components=(2,),
)


class Folded(nn.Module):
    """A network on squares of `fold` × `fold` pixels, which it takes for channels."""

    net: nn.Module
    fold: int

    def __call__(self, x: Array, c_noise: Array, dropout_key: ss.Key | None = None) -> Array:
        (height, width, channels), f = x.shape, self.fold
        rows, columns = height // f, width // f
        squares = x.reshape(rows, f, columns, f, channels).swapaxes(1, 2)
        out = self.net(squares.reshape(rows, columns, -1), c_noise, dropout_key)
        return out.reshape(rows, columns, f, f, channels).swapaxes(1, 2).reshape(x.shape)


def main(config: Config) -> Metrics:
    """Train, sample, evaluate, compare; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        train, test = ss.data.patches(stride=config.stride)
        train_key, eval_key, mixture_key, sample_key = jax.random.split(
            jax.random.key(config.seed), 4
        )
        params, losses = _train(train_key, config, train)
        metrics = {"train_seconds": time.perf_counter() - start}
        score_fn = make_score(config, params)
        chosen = np.linspace(0, len(test.images) - 1, config.num_test).astype(int)
        found, terms = _likelihood(eval_key, config, score_fn, test.images[chosen])
        mixture, mixture_bits = _best_mixture(mixture_key, config, train.images, test.images)
        metrics |= estimate("bits_per_dim", found) | terms
        metrics |= estimate("gmm_bits_per_dim", mixture_bits[chosen])
        metrics |= estimate("gmm_all_bits_per_dim", mixture_bits)
        metrics |= estimate("bits_below_gmm", mixture_bits[chosen] - found)
        metrics["gmm_components"] = mixture.n_components
        samples = _draw(sample_key, config, score_fn)
        metrics["total_seconds"] = time.perf_counter() - start
        _plot(folder, samples, test.images, losses)
        ss.save_params(folder / "score.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def make_net(config: Config) -> Folded:
    fields = {"num_blocks": config.num_blocks, "attention_levels": (), "dropout": config.dropout}
    channels = SHAPE[2] * config.fold**2
    net = ss.nets.UNet(config.width, config.multipliers, channels=channels, **fields)
    return Folded(AtLevel(net), config.fold)


def make_score(config: Config, params: ss.Params) -> Partial:
    net_fn = Partial(make_net(config).apply, params)
    return ss.score_from_preconditioned(config.sde, net_fn, sigma_data=config.sigma_data)


def _train(
    key: ss.Key, config: Config, train: ss.data.Examples
) -> tuple[ss.Params, np.ndarray | None]:
    init_key, batch_key, fit_key = jax.random.split(key, 3)

    def loss(params: ss.Params, key: ss.Key, batch: ss.data.Examples) -> Array:
        flip_key, data_key, dropout_key, loss_key = jax.random.split(key, 4)
        flip = jax.random.bernoulli(flip_key, shape=(len(batch.images), 1, 1, 1))
        levels = jnp.where(flip, batch.images[:, :, ::-1], batch.images)
        return ss.dsm_loss(
            loss_key,
            make_score(config, params),
            config.sde,
            to_model(data_key, levels),
            context=jax.random.split(dropout_key, len(levels)),
            weight=ss.likelihood_weight,
            times=ss.likelihood_times,
        )

    params = jax.jit(make_net(config).init)(init_key, jnp.zeros(SHAPE), 0.0)
    if config.params is not None:
        return ss.load_params(config.params, like=params)[0], None
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.num_steps // 50, config.num_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    scanned = 1 if jax.default_backend() == "cpu" else 50  # convolutions in loops are slow there
    state, losses = ss.fit(
        *(fit_key, loss, params, optimizer),
        ss.data.batches(batch_key, train, config.batch_size),
        num_steps=config.num_steps,
        ema_decay=config.ema_decay,
        steps_per_dispatch=scanned,
    )
    return state.ema_params, losses


def _likelihood(
    key: ss.Key, config: Config, score_fn: Partial, levels: Array
) -> tuple[Array, Metrics]:
    """Bits per dimension of each held-out patch, and the errors of their mean."""
    out = ss.dataset_log_likelihood(
        key,
        score_fn,
        config.sde,
        levels,
        dequantize=to_model,
        num_probes=config.num_probes,
        rtol=config.tolerance,
        atol=config.tolerance,
        chunk_size=16,
    )
    terms = {
        f"{name}_term": value / (DIMS * np.log(2.0))
        for name, value in out.budget._asdict().items()
        if np.isfinite(value)  # one probe or pass tells nothing of its error
    }
    return bits(out.log_probs), terms | {"num_evals": out.num_evals}


def bits(log_prob: np.ndarray) -> Array:
    return ss.bits_per_dim(jnp.asarray(log_prob), DIMS, **LEVELS)


def _best_mixture(
    key: ss.Key, config: Config, train: Array, test: Array
) -> tuple[GaussianMixture, Array]:
    """scikit-learn's mixture, of diagonal covariances in the cosine transform of decorrelated
    colours, with the best held-out bits/dim, and these.

    Along these axes, an orthonormal basis, the pixels of photographs are nearly uncorrelated. The
    size is chosen on the held-out patches themselves, which flatters it.
    """
    x, held_out = map(to_model, jax.random.split(key), (train, test))
    colours = np.linalg.eigh(np.cov(np.asarray(x).reshape(-1, SHAPE[2]).T))[1]

    def transform(x: Array) -> np.ndarray:
        cosines = dctn(np.asarray(x) @ colours, axes=(1, 2), norm="ortho")
        return cosines.reshape(-1, DIMS).astype(np.float32)

    x, held_out = transform(x), transform(held_out)
    best, best_bits = None, jnp.array(jnp.inf)
    for components in config.mixture_components:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model = GaussianMixture(
                components,
                covariance_type="diag",
                reg_covar=config.mixture_floor,
                max_iter=30,
                random_state=config.seed,
            ).fit(x)
        found = bits(model.score_samples(held_out))
        if found.mean() < best_bits.mean():
            best, best_bits = model, found
    return best, best_bits


def _draw(key: ss.Key, config: Config, score_fn: Partial) -> Array:
    def one(key: ss.Key, score_fn: Partial) -> Array:
        method = ss.adams(sigma_data=config.sigma_data)
        ts = ss.log_snr_grid(config.sde, config.sample_steps)
        return ss.sample_multistep(key, score_fn, config.sde, SHAPE, method=method, ts=ts)

    keys = jax.random.split(key, config.num_samples)
    return ss.map_in_chunks(Partial(one), keys, score_fn, chunk_size=min(36, len(keys)))


def _plot(folder: Path, samples: Array, test: Array, losses: np.ndarray | None) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    real = test[:: max(1, len(test) // len(samples))][: len(samples)]
    for ax, title, images, high in (
        (axes[0], "samples", samples, (-1.0, 1.0)),
        (axes[1], "held-out patches", real, (0, 255)),
    ):
        plots.image_grid(images, value_range=high, ax=ax).set_title(title)
    plots.save(figure, folder / "samples.png")
    if losses is not None:
        plots.save(plots.loss_curve(losses).figure, folder / "loss.png")


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
