"""Latent codes of digits: encode held-out digits along the probability flow, interpolate between
codes on the arc and on the line, change their temperature, and compare the codes of two networks.

The flow depends on the data's scores alone, so two networks that both learned them give a digit
the same code (Song et al. 2021, arXiv 2011.13456, sec. 4.3). Writes figure.png, metrics.json,
config.json and score.safetensors.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

import sde_score as ss
from experiments import digits
from experiments._run import Metrics, as_dict, check_numbers, cli, results_folder, write_json
from sde_score import plots

SDE = digits.SDE


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    num_steps: int = 3000  # of training, of each network
    other_width: int = 192  # of the second network; the first is that of experiments.digits
    num_test: int = 297  # held-out digits to encode
    num_pairs: int = 4
    num_weights: int = 9
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    tolerance: float = 1e-5  # of the solves
    seed: int = 0
    params: Path | None = None  # the first network's score.safetensors, instead of training
    out: Path = Path("runs/interpolate")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if not 2 * self.num_pairs <= self.num_test <= 297:
            raise ValueError(
                f"`num_test` must lie in 2 num_pairs … 297; got {self.num_test} for "
                f"{self.num_pairs} pairs. Give another --num-test."
            )
        if self.num_weights < 3 or not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError("Take at least 3 weights, and temperatures above 0.")


QUICK = Config(num_steps=300, num_test=40)


def main(config: Config) -> Metrics:
    """Train both networks, encode, interpolate, decode; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        first_key, second_key, data_key = jax.random.split(jax.random.key(config.seed), 3)
        train, test = ss.data.digits()
        x = digits.to_model(data_key, test.images[: config.num_test])
        params, score_fn = _train(first_key, train, config, digits.Config.width, config.params)
        _, other = _train(second_key, train, config, config.other_width, None)
        metrics: Metrics = {"train_seconds": time.perf_counter() - start}
        flow = jax.jit(jax.vmap(partial(_flow, config.tolerance), (None, 0, None, None)))
        encode = lambda score_fn, x: flow(score_fn, x, SDE.t0, SDE.t1)
        decode = lambda z: flow(score_fn, z, SDE.t1, SDE.t0)
        z, other_z = encode(score_fn, x), encode(other, x)
        errors = jnp.abs(decode(z) - x)
        metrics["round_trip_max"] = float(errors.max())
        metrics["round_trip_rms"] = float(jnp.sqrt(jnp.mean(errors**2)))
        metrics |= _agreement(z, other_z)
        arcs, lines = _paths(z, config)
        half = config.num_weights // 2
        for name, codes in (("code", z), ("arc", arcs[:, half]), ("line", lines[:, half])):
            metrics[f"{name}_mean_square"] = float(jnp.mean(codes**2))  # of N(0, I): 1
        shape = (*arcs.shape[:2], 8, 8, 1)
        rows = [decode(path.reshape(-1, 8, 8, 1)).reshape(shape) for path in (arcs, lines)]
        hot = [decode(t * z[: config.num_weights]) for t in config.temperatures]
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(_figure(config, rows, hot, z, other_z, metrics), folder / "figure.png")
        ss.save_params(folder / "score.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _train(
    key: ss.Key, train: ss.data.Examples, config: Config, width: int, params: Path | None
) -> tuple[ss.Params, Partial]:
    """A network trained as that of `digits`."""
    setup = digits.Config(width=width, num_steps=config.num_steps, params=params)
    net = ss.nets.MLP(setup.width, setup.depth, setup.dropout)
    trained, *_ = digits.train_score(key, setup, net, train)
    return trained, digits.bounded(digits.make_score(net, setup, trained))


def _flow(tolerance: float, score_fn: Partial, x: Array, start: Array, stop: Array) -> Array:
    options = {"rtol": tolerance, "atol": tolerance}
    return ss.probability_flow(score_fn, SDE, x, start=start, stop=stop, **options)


def _agreement(z: Array, other: Array) -> Metrics:
    """The correlation of two networks' codes of a digit over its 64 numbers, a mean over digits;
    and that of the codes of different digits.
    """

    def correlations(other: Array) -> np.ndarray:
        pairs = zip(z.reshape(len(z), -1), other.reshape(len(z), -1), strict=True)
        return np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs])

    same, different = correlations(other), correlations(jnp.roll(other, 1, axis=0))
    return {
        "latent_correlation": float(same.mean()),
        "latent_correlation_stderr": float(same.std(ddof=1) / np.sqrt(len(z))),
        "latent_correlation_min": float(same.min()),
        "latent_correlation_of_others": float(different.mean()),
    }


def _paths(z: Array, config: Config) -> tuple[Array, Array]:
    """The arcs and the straight lines between the codes of pairs, [pairs, weights, *event]."""
    x, y = z[: config.num_pairs], z[config.num_pairs : 2 * config.num_pairs]
    weights = jnp.linspace(0.0, 1.0, config.num_weights)
    arc = jax.vmap(jax.vmap(ss.spherical_interpolation, (None, None, 0)), (0, 0, None))
    w = weights[None, :, None, None, None]
    return arc(x, y, weights), (1.0 - w) * x[:, None] + w * y[:, None]


def _figure(
    config: Config, rows: list[Array], hot: list[Array], z: Array, other: Array, metrics: Metrics
) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    pairs = jnp.stack(rows, axis=1).reshape(-1, 8, 8, 1)  # arc, line, arc, line, …
    for ax, images, title in (
        (left, pairs, "between codes: arc, line, arc, …"),
        (middle, jnp.concatenate(hot), "codes times " + ", ".join(map(str, config.temperatures))),
    ):
        plots.image_grid(images, columns=config.num_weights, value_range=(-1, 1), ax=ax)
        ax.set_title(title)
    right.scatter(z[:60].ravel(), other[:60].ravel(), s=1, color=plots.BLUE, linewidths=0)
    right.axline((0, 0), slope=1, color=plots.DARK, linewidth=0.8)
    right.set(xlabel="code by one network", ylabel="by another", aspect="equal")
    right.set_title(f"mean correlation {metrics['latent_correlation']:.3f}")
    return figure


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
