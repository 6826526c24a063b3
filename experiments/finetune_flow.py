"""A score model's probability flow, trained on by maximum likelihood through its ODE.

Denoising score matching bounds the likelihood of the reverse SDE; what `log_likelihood` computes
is the probability flow's, which training through the solver improves directly. Writes figure.png
(the density before and after, and the truth), loss.png, metrics.json, config.json and
score.safetensors.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import diffrax
import jax
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

import sde_score as ss
from experiments._run import (
    Metrics,
    as_dict,
    check_numbers,
    cli,
    estimate,
    results_folder,
    write_json,
)
from experiments.ffjord_2d import SHOWN, integral
from experiments.toy_2d import Name
from sde_score import plots


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Name = "eight_gaussians"
    sde: ss.VP | ss.SubVP | ss.VE = ss.VP(t0=1e-3)
    num_train: int = 20_000
    width: int = 64
    depth: int = 2
    num_steps: int = 8_000  # of denoising score matching
    learning_rate: float = 2e-3
    finetune_steps: int = 300  # of maximum likelihood
    finetune_learning_rate: float = 5e-4
    solver_steps: int = 16  # in the latter, of the third order
    batch_size: int = 256
    tolerance: float = 1e-5  # of the solves that evaluate
    num_test: int = 5_000
    resolution: int = 100
    seed: int = 0
    out: Path = Path("runs/finetune_flow")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if self.num_test < 10:
            raise ValueError("`num_test` must be at least 10. Raise it.")


QUICK = Config(num_steps=500, finetune_steps=30, num_test=500, resolution=40)


def main(config: Config) -> Metrics:
    """Train, train on, evaluate before and after; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        density = getattr(ss.data, config.data)
        keys = iter(jax.random.split(jax.random.key(config.seed), 5))
        x0, test = density(next(keys), config.num_train), density(next(keys), config.num_test)
        params = ss.nets.MLP(config.width, config.depth).init(next(keys), x0[0], 0.0)
        before, _ = _train(next(keys), config, params, x0, finetune=False)
        metrics: Metrics = {"train_seconds": time.perf_counter() - start}
        after, losses = _train(next(keys), config, before, x0, finetune=True)
        metrics["finetune_seconds"] = time.perf_counter() - start - metrics["train_seconds"]
        models = {
            name: partial(_log_prob, config.tolerance, config.sde, _score(config, params))
            for name, params in (("before", before), ("after", after))
        }
        nll = {name: -jax.vmap(log_prob)(test) for name, log_prob in models.items()}
        for name, values in nll.items():
            metrics |= estimate(f"finetune_nll_{name}", values)
        above = nll["after"] + jax.vmap(density.log_prob)(test)
        metrics |= estimate("finetune_gain", nll["before"] - nll["after"])
        metrics |= estimate("nll_above_truth", above)
        metrics["score_integral"] = integral(models["before"], config.resolution)
        metrics["finetune_integral"] = integral(models["after"], config.resolution)
        metrics["total_seconds"] = time.perf_counter() - start
        titles = {"before": models["before"], "after": models["after"], "truth": density.log_prob}
        plots.save(_figure(config, titles), folder / "figure.png")
        plots.save(plots.loss_curve(losses).figure, folder / "loss.png")
        ss.save_params(folder / "score.safetensors", after, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _score(config: Config, params: ss.Params) -> Partial:
    net = ss.nets.MLP(config.width, config.depth)
    return ss.score_from_preconditioned(config.sde, Partial(net.apply, params), sigma_data=1.0)


def _train(
    key: ss.Key, config: Config, params: ss.Params, x0: Array, *, finetune: bool
) -> tuple[ss.Params, np.ndarray]:
    sde, batch_key, fit_key = config.sde, *jax.random.split(key)
    matching = {"weight": ss.likelihood_weight, "times": ss.likelihood_times}
    ts = ss.log_snr_grid(sde, config.solver_steps)[::-1]  # from the data to the noise
    flow = {"start": ts[0], "stop": ts[-1], "ts": ts, "solver": diffrax.Bosh3()}
    flow["adjoint"] = diffrax.RecursiveCheckpointAdjoint(checkpoints=config.solver_steps)
    flow["terminal_log_prob"] = partial(ss.prior_log_prob, sde)

    def loss(params: ss.Params, key: ss.Key, batch: Array) -> Array:
        score_fn = _score(config, params)
        if not finetune:
            return ss.dsm_loss(key, score_fn, sde, batch, **matching)
        return ss.flow_loss(key, ss.probability_flow_field(score_fn, sde), batch, **flow)

    num_steps = config.finetune_steps if finetune else config.num_steps
    rate = config.finetune_learning_rate if finetune else config.learning_rate
    schedule = optax.cosine_decay_schedule(rate, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
    batches = ss.data.batches(batch_key, x0, config.batch_size)
    state, losses = ss.fit(fit_key, loss, params, optimizer, batches, num_steps=num_steps)
    return state.params, losses


@jax.jit
def _log_prob(tolerance: float, sde: ss.SDE, score_fn: Partial, x: Array) -> Array:
    return ss.exact_log_likelihood(score_fn, sde, x, rtol=tolerance, atol=tolerance).log_prob


def _figure(config: Config, densities: dict) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for ax, (title, log_prob) in zip(figure.subplots(1, 3), densities.items(), strict=True):
        plots.density_2d(log_prob, extent=SHOWN, resolution=config.resolution, ax=ax)
        ax.set_title(title)
    return figure


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
