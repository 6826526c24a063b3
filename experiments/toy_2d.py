"""Two-dimensional densities: train a score model with any SDE and objective, and compare it with
the truth.

Writes figure.png (data, samples of the reverse SDE and of the probability flow, score field, the
model's density beside the true one), metrics.json, config.json and score.safetensors.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.tree_util import Partial
from jaxtyping import Array

import sde_score as ss
from experiments._run import (
    Metrics,
    as_dict,
    check_numbers,
    cli,
    results_folder,
    write_json,
)
from sde_score import plots

Name = Literal[
    "two_moons",
    "circles",
    "swiss_roll",
    "eight_gaussians",
    "pinwheel",
    "checkerboard",
    "two_spirals",
]
Objective = Literal["dsm", "ism", "ssm", "fdsm"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Name = "two_moons"
    objective: Objective = "dsm"  # denoising, implicit, sliced, finite-difference score matching
    sde: ss.VP | ss.SubVP | ss.VE = ss.VP()
    num_train: int = 10_000
    width: int = 128
    depth: int = 3
    num_steps: int = 10_000
    batch_size: int = 512
    learning_rate: float = 2e-3
    num_samples: int = 4_000
    num_test: int = 1_000
    resolution: int = 100
    seed: int = 0
    params: Path | None = None  # a score.safetensors to evaluate instead of training
    out: Path = Path("runs/toy_2d")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if min(self.num_samples, self.num_test) < 10:
            raise ValueError("`num_samples` and `num_test` must be at least 10. Raise them.")


QUICK = Config(num_steps=1_000, num_samples=500, num_test=100, resolution=30)


def main(config: Config) -> Metrics:
    """Train, sample, evaluate; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        density = getattr(ss.data, config.data)
        keys = iter(jax.random.split(jax.random.key(config.seed), 8))
        x0 = density(next(keys), config.num_train)
        params = train_score(next(keys), config, x0)
        score_fn = make_score(config, params)
        draws = {
            "sde": _draw(partial(ss.sample_sde, shape=(2,)), next(keys), score_fn, config),
            "ode": _draw(partial(ss.sample_ode, shape=(2,)), next(keys), score_fn, config),
        }
        real, test = density(next(keys), config.num_samples), density(next(keys), config.num_test)
        metrics = _nll(density, score_fn, config, test)
        for name, samples in draws.items():
            metrics |= _two_sample(next(keys), name, samples, real)
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(_figure(config, density, score_fn, x0, draws), folder / "figure.png")
        ss.save_params(folder / "score.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def make_score(config: Config, params: ss.Params) -> Partial:
    net = ss.nets.MLP(config.width, config.depth)
    return ss.score_from_preconditioned(config.sde, Partial(net.apply, params), sigma_data=1.0)


def train_score(key: ss.Key, config: Config, x0: Array) -> ss.Params:
    init_key, batch_key, fit_key = jax.random.split(key, 3)

    def loss(params: ss.Params, key: ss.Key, batch: Array) -> Array:
        return getattr(ss, f"{config.objective}_loss")(
            key,
            make_score(config, params),
            config.sde,
            batch,
            weight=ss.likelihood_weight,
            times=ss.likelihood_times,
        )

    params = ss.nets.MLP(config.width, config.depth).init(init_key, x0[0], 0.0)
    if config.params is not None:
        return ss.load_params(config.params, like=params)[0]
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    batches = ss.data.batches(batch_key, x0, config.batch_size)
    state, _ = ss.fit(
        fit_key, loss, params, optax.adam(schedule), batches, num_steps=config.num_steps
    )
    return state.ema_params


def _draw(sampler: partial, key: ss.Key, score_fn: Partial, config: Config) -> Array:
    keys = jax.random.split(key, config.num_samples)
    draw = jax.jit(lambda s, sde, keys: jax.vmap(lambda k: sampler(k, s, sde))(keys))
    return draw(score_fn, config.sde, keys)


@jax.jit
def _log_prob(score_fn: Partial, sde: ss.SDE, x: Array) -> Array:
    return ss.exact_log_likelihood(score_fn, sde, x).log_prob


def _nll(density: ss.data.Density2D, score_fn: Partial, config: Config, test: Array) -> Metrics:
    """Mean negative log-likelihoods of test points, in nats: the model's, the truth's, their
    difference.
    """
    model = -jax.vmap(partial(_log_prob, score_fn, config.sde))(test)
    truth = -jax.vmap(density.log_prob)(test)
    stderr = lambda values: float(jnp.std(values, ddof=1) / jnp.sqrt(values.size))
    return {
        "nll": float(model.mean()),
        "nll_stderr": stderr(model),
        "true_nll": float(truth.mean()),
        "nll_gap": float((model - truth).mean()),
        "nll_gap_stderr": stderr(model - truth),
    }


def _two_sample(key: ss.Key, name: str, samples: Array, real: Array) -> Metrics:
    estimates = {
        "mmd": ss.metrics.mmd(samples, real, bandwidth=0.5),
        "energy_distance": ss.metrics.energy_distance(samples, real),
        "sliced_wasserstein": ss.metrics.sliced_wasserstein(key, samples, real),
        "c2st": ss.metrics.c2st(samples, real),
    }
    values = {f"{name}_{key}": float(estimate.value) for key, estimate in estimates.items()}
    return values | {f"{name}_{key}_stderr": float(e.stderr) for key, e in estimates.items()}


def _figure(
    config: Config,
    density: ss.data.Density2D,
    score_fn: Partial,
    x0: Array,
    draws: dict[str, Array],
) -> plt.Figure:
    figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained")
    reach = 1.2 * float(jnp.abs(x0).max())
    extent = (-reach, reach, -reach, reach)
    shown = {"data": x0[: config.num_samples], "reverse SDE": draws["sde"]}
    shown |= {"probability flow": draws["ode"]}
    for ax, (title, points) in zip(axes[0], shown.items(), strict=True):
        plots.scatter_2d(points[:2_000], extent=extent, ax=ax).set_title(title)
    t = jnp.asarray(config.sde.t0 + 0.1 * (config.sde.t1 - config.sde.t0))
    plots.score_field(partial(_at, score_fn, t), extent=extent, ax=axes[1, 0])
    axes[1, 0].set_title(f"score at t = {t:.2f}")
    density_2d = partial(plots.density_2d, extent=extent, resolution=config.resolution)
    model = partial(_log_prob, score_fn, config.sde)
    density_2d(model, ax=axes[1, 1]).set_title("the model's density")
    density_2d(density.log_prob, ax=axes[1, 2]).set_title("the true density")
    return figure


def _at(score_fn: Partial, t: Array, x: Array) -> Array:
    return score_fn(x, t)


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
