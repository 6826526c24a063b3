"""FFJORD in two dimensions: a network's vector field is trained by maximum likelihood through its
ODE, and its density compared with the truth.

Trains on a fixed grid of steps, evaluates with adaptive ones. Writes figure.png (data, samples,
the model's density beside the true one), film.png (samples and densities on the way from the
normal), metrics.json, config.json and field.safetensors.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
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
from experiments.toy_2d import Name
from sde_score import plots

REACH = 4.0  # the densities of ss.data lie in [−4, 4]²
SHOWN = (-3.0, 3.0, -3.0, 3.0)
FRAMES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)  # times, from the normal to the data


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Name = "eight_gaussians"
    num_train: int = 20_000
    width: int = 64
    depth: int = 3
    num_steps: int = 1_500
    batch_size: int = 256
    learning_rate: float = 3e-3
    solver_steps: int = 10  # of the third order, in training
    tolerance: float = 1e-5  # of the solves that evaluate
    num_samples: int = 4_000
    num_test: int = 10_000
    resolution: int = 100
    seed: int = 0
    params: Path | None = None  # a field.safetensors to evaluate instead of training
    out: Path = Path("runs/ffjord_2d")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))


QUICK = Config(num_steps=150, num_samples=500, num_test=500, resolution=40)


def main(config: Config) -> Metrics:
    """Train, sample, evaluate; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        density = getattr(ss.data, config.data)
        keys = iter(jax.random.split(jax.random.key(config.seed), 5))
        x0, test = density(next(keys), config.num_train), density(next(keys), config.num_test)
        params = _train(next(keys), config, x0)
        metrics: Metrics = {"train_seconds": time.perf_counter() - start}
        field = Partial(ss.nets.ConcatSquash(config.width, config.depth).apply, params)
        log_prob = lambda x: _evaluate(config.tolerance, field, jnp.zeros(()), x).log_prob
        found = _evaluate_all(config.tolerance, field, jnp.zeros(()), test)
        truth = jax.vmap(density.log_prob)(test)
        metrics |= estimate("nll", -found.log_prob) | estimate(
            "nll_above_truth", truth - found.log_prob
        )
        metrics["num_evals"] = float(found.num_evals.mean())
        metrics["entropy"] = integral(density.log_prob, 500, of=np.negative)
        metrics["integral"] = integral(log_prob, config.resolution)
        paths, metrics["sample_num_evals"] = _draw(next(keys), config, field)
        real = density(next(keys), config.num_samples)
        distance = ss.metrics.energy_distance(paths[:, -1], real)
        metrics["energy_distance"], metrics["energy_distance_stderr"] = map(float, distance)
        metrics["total_seconds"] = time.perf_counter() - start
        panels = {"the model's density": log_prob, "the true density": density.log_prob}
        plots.save(_figure(config, x0, paths[:, -1], panels), folder / "figure.png")
        plots.save(_film(config, field, paths), folder / "film.png")
        ss.save_params(folder / "field.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _train(key: ss.Key, config: Config, x0: Array) -> ss.Params:
    init_key, batch_key, fit_key = jax.random.split(key, 3)
    net = ss.nets.ConcatSquash(config.width, config.depth)
    params = net.init(init_key, x0[0], 0.0)
    if config.params is not None:
        return ss.load_params(config.params, like=params)[0]
    options = {"ts": jnp.linspace(0.0, 1.0, config.solver_steps + 1), "solver": diffrax.Bosh3()}
    # every step a checkpoint: none is computed twice, and the states are small
    options["adjoint"] = diffrax.RecursiveCheckpointAdjoint(checkpoints=config.solver_steps)

    def loss(params: ss.Params, key: ss.Key, batch: Array) -> Array:
        # Of equal cost, the exact trace takes fewer steps and learns less, in two dimensions too.
        return ss.flow_loss(key, Partial(net.apply, params), batch, **options)

    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    batches = ss.data.batches(batch_key, x0, config.batch_size)
    return ss.fit(fit_key, loss, params, optimizer, batches, num_steps=config.num_steps)[0].params


@jax.jit
def _evaluate(tolerance: float, field: Partial, start: Array, x: Array) -> ss.Likelihood:
    """The log-density at time `start`, which the flow from there to the normal gives."""
    return ss.exact_flow_log_prob(field, x, start=start, rtol=tolerance, atol=tolerance)


_evaluate_all = jax.jit(jax.vmap(_evaluate, (None, None, None, 0)))


def integral(log_prob: Callable, resolution: int, of: Callable = lambda log_p: 1.0) -> float:
    """∫ p f(log p) over [−4, 4]², by the midpoint rule."""
    points = _grid(REACH, resolution)
    log_p = np.asarray(jax.lax.map(log_prob, points, batch_size=4096), np.float64)
    log_p = log_p[np.isfinite(log_p)]
    return float((2 * REACH / resolution) ** 2 * np.sum(np.exp(log_p) * of(log_p)))


def _grid(reach: float, resolution: int) -> Array:
    middles = reach * ((2 * np.arange(resolution) + 1) / resolution - 1)
    return jnp.asarray(np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2), float)


def _draw(key: ss.Key, config: Config, field: Partial) -> tuple[Array, float]:
    """Paths from the normal to the data, through FRAMES; their evaluations on average."""
    options = {"rtol": config.tolerance, "atol": config.tolerance, "saveat": jnp.array(FRAMES)}
    solve = lambda field, x: ss.integrate(field, x, start=1.0, stop=0.0, **options)
    noise = jax.random.normal(key, (config.num_samples, 2))
    solution = jax.jit(jax.vmap(solve, (None, 0)))(field, noise)
    return solution.trajectory, float(solution.num_evals.mean())


def _figure(config: Config, x0: Array, samples: Array, densities: dict[str, Callable]) -> Figure:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes, show = figure.subplots(1, 4), {"extent": SHOWN, "resolution": config.resolution}
    for ax, title, points in zip(axes, ("data", "samples"), (x0, samples), strict=False):
        plots.scatter_2d(points[:2_000], extent=SHOWN, ax=ax).set_title(title)
    for ax, (title, log_prob) in zip(axes[2:], densities.items(), strict=True):
        plots.density_2d(log_prob, **show, ax=ax).set_title(title)
    return figure


def _film(config: Config, field: Partial, paths: Array) -> Figure:
    """Samples above the densities at FRAMES."""
    figure = Figure(figsize=(2.2 * len(FRAMES), 4.6), layout="constrained")
    rows, points = figure.subplots(2, len(FRAMES)), _grid(SHOWN[1], config.resolution)
    for i, t in enumerate(FRAMES):
        plots.scatter_2d(paths[:2_000, i], extent=SHOWN, ax=rows[0, i]).set_title(f"$t = {t:g}$")
        log_p = _evaluate_all(1e-3, field, jnp.asarray(t), points).log_prob  # one compilation
        image = np.exp(log_p).reshape(config.resolution, -1)
        rows[1, i].imshow(image, origin="lower", extent=SHOWN, cmap="Blues", vmin=0.0)
    for ax in rows.ravel():
        ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
