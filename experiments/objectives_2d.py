"""One score network, five objectives: score matching from data to samples on the plane.

A network without time is fitted by explicit, implicit, sliced, finite-difference and denoising
score matching, at equal steps. Each score is compared with the truth, and sampled by Langevin
dynamics from uniform noise on the box. An energy network, fitted by implicit score matching, is a
density as well, once its log Z is found: by quadrature and by importance sampling.

Writes scores.png (score fields), samples.png (Langevin samples), energy.png (the energy's density
beside the truth), metrics.json, config.json and params.safetensors. Two things to see. The scores
are right where the data are, yet from noise Langevin samples fall into the nearest part of the
data and seldom leave it: how much mass each part holds comes out wrong. And with --num-train 10000
the implicit losses sink below −½E‖∇log p‖², the minimum on unseen data: they overfit.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array

import sde_score as ss
from experiments._run import Metrics, as_dict, check_numbers, cli, results_folder, write_json
from sde_score import plots

# not the checkerboard, whose score is 0 wherever it has one
Name = Literal["two_moons", "circles", "swiss_roll", "eight_gaussians", "pinwheel", "two_spirals"]
Objective = Callable[[ss.Key, ss.ScoreFn, Array], Array]
REACH = 3.0  # the box is [−3, 3]²; less than 1e-4 of any of these densities lies outside
VIEW = (-2.6, 2.6, -2.6, 2.6)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Name = "swiss_roll"
    sigma: float = 0.05  # of denoising score matching, in data units
    num_train: int = 100_000
    width: int = 128
    depth: int = 3
    energy_widths: tuple[int, ...] = (50, 50, 50)
    num_steps: int = 4_000
    batch_size: int = 512
    learning_rate: float = 2e-3
    num_samples: int = 2_000
    langevin_steps: int = 2_000
    step_size: float = 2e-3
    num_test: int = 2_000
    num_importance: int = 200_000
    resolution: int = 400
    seed: int = 0
    params: Path | None = None  # a params.safetensors to evaluate instead of training
    out: Path = Path("runs/objectives_2d")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if min(self.num_samples, self.num_test) < 10:
            raise ValueError("`num_samples` and `num_test` must be at least 10. Raise them.")


QUICK = Config(num_steps=300, num_samples=400, langevin_steps=500, num_test=400, resolution=200)


def objectives(true_score: ss.ScoreFn, sigma: float) -> dict[str, Objective]:
    """Score matching on one example: to compare objectives, change one word."""
    probe = lambda key, x: ss.rademacher_probes(key, 1, x.shape)
    finite_difference = ss.finite_difference_score_matching
    return {
        "explicit": lambda key, s, x: ss.explicit_score_matching(s, true_score, x),
        "implicit": lambda key, s, x: ss.implicit_score_matching(s, x),
        "sliced": lambda key, s, x: ss.sliced_score_matching(s, x, probe(key, x)),
        "finite_difference": lambda key, s, x: finite_difference(s, x, probe(key, x)),
        "denoising": lambda key, s, x: ss.single_sigma_score_matching(key, s, x, sigma=sigma),
    }


class Model(NamedTuple):
    init: Callable[[ss.Key, Array], ss.Params]
    score: Callable[[ss.Params], Partial]
    objective: Objective


def main(config: Config) -> Metrics:
    """Fit, compare, sample, normalise; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        density = getattr(ss.data, config.data)
        keys = iter(jax.random.split(jax.random.key(config.seed), 7))
        x0, test = density(next(keys), config.num_train), density(next(keys), config.num_test)
        truth = Partial(jax.grad(density.log_prob))
        models = _models(config, truth)
        params = _train(next(keys), config, models, x0)
        scores = {name: model.score(params[name]) for name, model in models.items()}
        metrics = _score_errors(scores, truth, test)
        metrics |= _noised_error(next(keys), config.sigma, scores["denoising"], density, test)
        real = density(next(keys), config.num_samples)
        draws = _langevin(next(keys), config, scores)
        metrics |= _sample_errors(draws, real)
        energy_fn = Partial(ss.nets.EnergyMLP(config.energy_widths).apply, params["energy"])
        metrics |= _partition(next(keys), config, energy_fn)
        log_prob = Partial(_log_prob, energy_fn, metrics["log_z"])
        metrics |= _density_errors(density, log_prob, x0, test)
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(_score_figure(density, truth, scores), folder / "scores.png")
        plots.save(_sample_figure(real, draws), folder / "samples.png")
        plots.save(_energy_figure(config, density, log_prob, test), folder / "energy.png")
        ss.save_params(folder / "params.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _models(config: Config, truth: Partial) -> dict[str, Model]:
    net = ss.nets.MLP(config.width, config.depth)
    energy_net = ss.nets.EnergyMLP(config.energy_widths)
    init = lambda key, x: net.init(key, x, 0.0)
    score = lambda params: Partial(_without_time, Partial(net.apply, params))
    energy_score = lambda params: ss.score_from_energy(Partial(energy_net.apply, params))
    known = objectives(truth, config.sigma)
    models = {name: Model(init, score, objective) for name, objective in known.items()}
    return models | {"energy": Model(energy_net.init, energy_score, known["implicit"])}


def _without_time(net_fn: Partial, x: Array) -> Array:
    return net_fn(x, 0.0)


def _train(
    key: ss.Key, config: Config, models: dict[str, Model], x0: Array
) -> dict[str, ss.Params]:
    init_key, batch_key, fit_key = jax.random.split(key, 3)
    init_keys, fit_keys = (jax.random.split(k, len(models)) for k in (init_key, fit_key))
    batches = ss.data.batches(batch_key, x0, config.batch_size)  # the same for all
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    params = {
        name: jax.jit(model.init)(k, x0[0])
        for k, (name, model) in zip(init_keys, models.items(), strict=True)
    }
    if config.params is not None:
        return ss.load_params(config.params, like=params)[0]
    for k, (name, model) in zip(fit_keys, models.items(), strict=True):
        loss = partial(_loss, model)
        state, _ = ss.fit(k, loss, params[name], optimizer, batches, num_steps=config.num_steps)
        params[name] = state.params  # the schedule ends at 0: no average is needed
    return params


def _loss(model: Model, params: ss.Params, key: ss.Key, batch: Array) -> Array:
    score_fn = model.score(params)
    one = lambda key, x: model.objective(key, score_fn, x)
    return jnp.mean(jax.vmap(one)(jax.random.split(key, len(batch)), batch))


def _langevin(key: ss.Key, config: Config, scores: dict[str, Partial]) -> dict[str, Array]:
    """Samples of each score, from uniform noise on the box."""

    @jax.jit
    def draw(score_fn: Partial, keys: Array) -> Array:
        def one(key: ss.Key) -> Array:
            start_key, langevin_key = jax.random.split(key)
            start = jax.random.uniform(start_key, (2,), minval=-REACH, maxval=REACH)
            options = {"step_size": config.step_size, "num_steps": config.langevin_steps}
            return ss.langevin_sample(langevin_key, score_fn, start, **options)

        return jax.vmap(one)(keys)

    keys = jax.random.split(key, (len(scores), config.num_samples))
    return {name: draw(s, k) for k, (name, s) in zip(keys, scores.items(), strict=True)}


def _with_stderr(name: str, value: Array, stderr: Array) -> Metrics:
    return {name: float(value), f"{name}_stderr": float(stderr)}


def _mean(name: str, values: Array) -> Metrics:
    return _with_stderr(name, values.mean(), values.std(ddof=1) / values.size**0.5)


@jax.jit
def _fisher(score_fn: Partial, truth: Partial, points: Array) -> Array:
    error = lambda x: ss.explicit_score_matching(score_fn, truth, x)
    return jax.lax.map(error, points, batch_size=100)


@jax.jit
def _curl(score_fn: Partial, points: Array) -> Array:
    return jax.vmap(lambda x: ss.curl(score_fn, x))(points)


def _score_errors(scores: dict[str, Partial], truth: Partial, test: Array) -> Metrics:
    """½E‖s − ∇log p‖² and the mean curl on held-out points; ½E‖∇log p‖² is the error of s = 0."""
    metrics = _mean("zero_fisher", _fisher(Partial(jnp.zeros_like), truth, test))
    for name, score_fn in scores.items():
        metrics |= _mean(f"{name}_fisher", _fisher(score_fn, truth, test))
        metrics |= _mean(f"{name}_curl", _curl(score_fn, test))
    return metrics


def _noised_error(
    key: ss.Key, sigma: float, score_fn: Partial, density: ss.data.Density2D, test: Array
) -> Metrics:
    """½E‖s − ∇log p_sigma‖² on noised points: what denoising score matching minimises."""
    truth = Partial(jax.grad(partial(noised_log_prob, density, sigma)))
    noised = test + sigma * jax.random.normal(key, test.shape)
    return _mean("denoising_noised_fisher", _fisher(score_fn, truth, noised))


def noised_log_prob(density: ss.data.Density2D, sigma: float, x: Array) -> Array:
    """log p_sigma = log E p(x − sigma z), z ~ N(0, I), by Gauss–Hermite on 16 nodes each way."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(16)
    z = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weight = jnp.asarray(np.outer(weights, weights).ravel() / (2 * np.pi), x.dtype)
    log_probs = jax.vmap(density.log_prob)(x[None] - sigma * jnp.asarray(z, x.dtype))
    return jax.nn.logsumexp(log_probs, b=weight)


def _log_prob(energy_fn: Partial, log_z: float, x: Array) -> Array:
    return -energy_fn(x) - log_z


def _partition(key: ss.Key, config: Config, energy_fn: Partial) -> Metrics:
    """log Z, Z = ∫ e^{−E} over the box: by the midpoint rule, by uniform importance sampling."""

    @jax.jit
    def log_mean(points: Array) -> tuple[Array, Array]:
        log_weights = 2 * np.log(2 * REACH) - jax.vmap(energy_fn)(points)
        largest = jnp.max(log_weights)
        weights = jnp.exp(log_weights - largest)
        mean = jnp.mean(weights)
        return largest + jnp.log(mean), jnp.std(weights) / mean / len(points) ** 0.5

    def midpoint(resolution: int) -> float:
        middles = REACH * ((2 * np.arange(resolution) + 1) / resolution - 1)
        grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
        return float(log_mean(jnp.asarray(grid, float))[0])

    points = jax.random.uniform(key, (config.num_importance, 2), minval=-REACH, maxval=REACH)
    log_z = midpoint(config.resolution)
    error = abs(log_z - midpoint(config.resolution // 2))
    metrics = {"log_z": log_z, "log_z_quadrature_error": error}
    return metrics | _with_stderr("log_z_importance", *log_mean(points))


def _density_errors(
    density: ss.data.Density2D, log_prob: Partial, x0: Array, test: Array
) -> Metrics:
    """KL divergence and mean |log p − log q| on held-out points, in nats: the energy's, a fitted
    Gaussian's.
    """
    gaussian = ss.GaussianMixture(jnp.ones(1), x0.mean(0)[None], jnp.cov(x0.T)[None])
    truth, metrics = jax.vmap(density.log_prob)(test), {}
    for name, fn in {"energy": log_prob, "gaussian": gaussian.log_prob}.items():
        difference = truth - jax.vmap(fn)(test)
        metrics |= _mean(f"{name}_kl", difference)
        metrics |= _mean(f"{name}_log_density_error", jnp.abs(difference))
    return metrics


def _sample_errors(draws: dict[str, Array], real: Array) -> Metrics:
    """The share of samples that left the box, where no data hold them, and the distance of the
    rest to the data.
    """
    metrics = {}
    for name, samples in draws.items():
        inside = jnp.all(jnp.abs(samples) < REACH, axis=1)  # false for nan
        metrics[f"{name}_escaped"] = float(1.0 - inside.mean())
        if inside.sum() < 10:  # too few to tell: the fraction that escaped says it all
            continue
        distance = ss.metrics.energy_distance(samples[inside], real)
        metrics |= _with_stderr(f"{name}_energy_distance", *distance)
    return metrics


def _panels(rows: int, columns: int) -> tuple[plt.Figure, np.ndarray]:
    size = (3.3 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    return figure, axes.ravel()


def _finish(figure: plt.Figure) -> plt.Figure:
    for ax in figure.axes:
        ax.label_outer()
    return figure


def _score_figure(
    density: ss.data.Density2D, truth: Partial, scores: dict[str, Partial]
) -> plt.Figure:
    figure, axes = _panels(2, 3)
    shown = {"true score": truth} | {name: scores[name] for name in scores if name != "energy"}
    for ax, (title, score_fn) in zip(axes, shown.items(), strict=True):
        plots.density_2d(density.log_prob, extent=VIEW, ax=ax)
        plots.score_field(score_fn, extent=VIEW, resolution=22, ax=ax).set_title(_title(title))
    return _finish(figure)


def _sample_figure(real: Array, draws: dict[str, Array]) -> plt.Figure:
    figure, axes = _panels(2, 3)
    shown = {"data": real} | {name: draws[name] for name in draws if name != "energy"}
    for ax, (title, points) in zip(axes, shown.items(), strict=True):
        finite = points[jnp.all(jnp.isfinite(points), axis=1)]
        plots.scatter_2d(finite, extent=VIEW, ax=ax).set_title(_title(title))
    return _finish(figure)


def _energy_figure(
    config: Config, density: ss.data.Density2D, log_prob: Partial, test: Array
) -> plt.Figure:
    figure, (left, middle, right) = _panels(1, 3)
    density_2d = partial(plots.density_2d, extent=VIEW, resolution=config.resolution // 2)
    density_2d(density.log_prob, ax=left).set_title("true density")
    density_2d(log_prob, ax=middle).set_title("energy network, $e^{-E}/Z$")
    known, learned = (np.asarray(jax.vmap(fn)(test)) for fn in (density.log_prob, log_prob))
    right.scatter(known, learned, s=4, alpha=0.4, color=plots.BLUE, linewidths=0)
    ends = [known.min(), known.max()]
    right.plot(ends, ends, color=plots.DARK, linewidth=1)
    right.set(xlabel="true log-density (nats)", ylabel="$-E - \\log Z$ (nats)")
    right.set(title="held-out points", box_aspect=1)
    return figure


def _title(name: str) -> str:
    return name.replace("_", " ")


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
