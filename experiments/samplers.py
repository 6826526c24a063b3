"""Every sampler on one trained model, and on the exact score of the same density.

Eight Gaussians are a mixture, whose score is known at all times. So the table parts what the
sampler gets wrong (beside the exact score) from what the model does (the rest). Every sampler gets
the same number of evaluations but the adaptive one, which counts its own.

Writes model.png and oracle.png (a panel for each sampler), film.png (states of the reverse SDE and
of the probability flow, from the same noise), metrics.json, config.json and score.safetensors.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

import sde_score as ss
from experiments._run import Metrics, as_dict, check_numbers, cli, results_folder, write_json
from sde_score import plots

Name = Literal[
    "euler_maruyama",
    "reverse_diffusion",
    "ancestral",
    "ancestral_beta",
    "ddim_eta_half",
    "predictor_corrector",
    "annealed_langevin",
    "shark",
    "edm_stochastic",
    "sde_dpm_solver_pp",
    "ddim",
    "heun",
    "dopri5",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_3m",
    "unipc",
    "adams",
]
ALL: tuple[Name, ...] = get_args(Name)
EXTENT = (-2.2, 2.2, -2.2, 2.2)
FRAMES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.0)  # of the way from t0 to t1, in the film
MODES = ("#E69F00", "#56B4E9", "#009E73", "#999999", "#0072B2", "#D55E00", "#CC79A7", "#333333")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    sde: ss.VP | ss.SubVP | ss.VE = ss.VP(t0=1e-3)
    evaluations: int = 16  # of the score for each sample
    tolerance: float = 1e-2  # of the adaptive sampler
    samplers: tuple[Name, ...] = ALL
    num_train: int = 10_000
    width: int = 128
    depth: int = 3
    num_steps: int = 6_000
    batch_size: int = 512
    learning_rate: float = 2e-3
    num_samples: int = 5_000
    seed: int = 0
    params: Path | None = None  # a score.safetensors to evaluate instead of training
    out: Path = Path("runs/samplers")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if self.evaluations < 6:
            raise ValueError("`evaluations` must be at least 6. Raise it.")
        if min(self.num_samples, self.num_train) < 10:
            raise ValueError("`num_samples` and `num_train` must be at least 10. Raise them.")


QUICK = Config(
    samplers=("euler_maruyama", "ancestral", "heun", "dopri5", "adams"),
    num_steps=1_000,
    num_samples=500,
)


def main(config: Config) -> Metrics:
    """Train, draw by every sampler from either score, compare, show; returns the metrics."""
    start = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(config.seed), 6))
    with results_folder(config.out, config) as folder:
        params = _train(next(keys), config)
        scores = {"model": _score(config, params), "oracle": ss.exact_score(truth(), config.sde)}
        real, exact = (ss.data.eight_gaussians(next(keys), config.num_samples) for _ in range(2))
        metrics = _distance("exact", exact, real)
        draw_key, film_key = next(keys), next(keys)
        for score, score_fn in scores.items():
            panels = {"exact draws": exact}
            for name in config.samplers:
                x, costs = _draw(draw_key, config, name, score_fn)
                metrics |= {f"{score}_{name}_{key}": value for key, value in costs.items()}
                metrics |= _distance(f"{score}_{name}", x, real)
                panels[f"{name}\n{costs['evaluations']:.0f} evaluations"] = x
            plots.save(_gallery(panels), folder / f"{score}.png")
        plots.save(_film(film_key, config, scores["model"]), folder / "film.png")
        metrics["total_seconds"] = time.perf_counter() - start
        ss.save_params(folder / "score.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    print(_table(config, metrics))
    return metrics


def _distance(name: str, x: Array, real: Array) -> Metrics:
    distance, stderr = map(float, ss.metrics.energy_distance(x, real))
    return {f"{name}_energy_distance": distance, f"{name}_energy_distance_stderr": stderr}


def truth() -> ss.GaussianMixture:
    """`ss.data.eight_gaussians`, as a mixture."""
    angles = np.arange(8) * np.pi / 4
    means = 1.4 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return ss.GaussianMixture(np.full(8, 1 / 8), means, np.tile(0.175**2 * np.eye(2), (8, 1, 1)))


def make_samplers(config: Config) -> dict[Name, tuple[Callable, int]]:
    """Each as (key, score_fn, sde, shape) -> a sample, or a `Solution` that holds one and counts
    its evaluations; and how many it takes.

    Equal steps in log-SNR suit the methods of higher order, equal steps in t the others.
    """
    sde, half = config.sde, config.evaluations // 2
    even, log = ss.uniform_grid(sde, config.evaluations), ss.log_snr_grid(sde, config.evaluations)
    half_even = ss.uniform_grid(sde, half)
    corrected = ss.predictor_corrector(ss.ancestral, ss.langevin(0.16))

    def step(step: ss.Step, ts: Array, cost: int = 1) -> tuple[Callable, int]:
        return partial(ss.sample, step=step, ts=ts, finish=None), cost * (ts.size - 1)

    def multistep(method: ss.Multistep) -> tuple[Callable, int]:
        return partial(ss.sample_multistep, method=method, ts=log, finish=None), log.size - 1

    annealed = partial(
        ss.annealed_langevin_sample,
        ts=ss.log_snr_grid(sde, half - 1),
        num_steps=2,
        step_size=sde.sigma(sde.t0) ** 2,
        finish=None,
    )
    shark = partial(ss.solve_sde, solver=diffrax.ShARK(), ts=half_even, finish=None)
    dopri5 = partial(ss.solve_ode, rtol=config.tolerance, atol=config.tolerance)
    return {
        "euler_maruyama": step(ss.euler_maruyama, even),
        "reverse_diffusion": step(ss.reverse_diffusion, even),
        "ancestral": step(ss.ancestral, even),
        "ancestral_beta": step(ss.ancestral_beta, even),
        "ddim_eta_half": step(ss.ddim_eta(0.5), even),
        "predictor_corrector": step(corrected, half_even, cost=2),
        "annealed_langevin": (annealed, 2 * half),
        "shark": (shark, 2 * half),
        "edm_stochastic": step(ss.edm_stochastic(1.0 / half), half_even, cost=2),
        "sde_dpm_solver_pp": multistep(ss.sde_dpm_solver_pp()),
        "ddim": step(ss.ddim, even),
        "heun": step(ss.heun, half_even, cost=2),
        "dopri5": (dopri5, 0),
        "dpm_solver_pp_2m": multistep(ss.dpm_solver_pp(2)),
        "dpm_solver_pp_3m": multistep(ss.dpm_solver_pp(3)),
        "unipc": multistep(ss.unipc(2)),
        "adams": multistep(ss.adams(3)),
    }


def _train(key: ss.Key, config: Config) -> ss.Params:
    data_key, init_key, batch_key, fit_key = jax.random.split(key, 4)
    params = ss.nets.MLP(config.width, config.depth).init(init_key, jnp.zeros(2), 0.0)
    if config.params is not None:
        return ss.load_params(config.params, like=params)[0]

    def loss(params: ss.Params, key: ss.Key, batch: Array) -> Array:
        options = {"weight": ss.likelihood_weight, "times": ss.likelihood_times}
        return ss.dsm_loss(key, _score(config, params), config.sde, batch, **options)

    x0 = ss.data.eight_gaussians(data_key, config.num_train)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    batches = ss.data.batches(batch_key, x0, config.batch_size)
    optimizer, num_steps = optax.adam(schedule), config.num_steps
    return ss.fit(fit_key, loss, params, optimizer, batches, num_steps=num_steps)[0].ema_params


def _score(config: Config, params: ss.Params) -> Partial:
    net = ss.nets.MLP(config.width, config.depth)
    return ss.score_from_preconditioned(config.sde, Partial(net.apply, params), sigma_data=1.0)


def _draw(key: ss.Key, config: Config, sampler: Name, score_fn: Partial) -> tuple[Array, Metrics]:
    """Samples, and what they cost: evaluations of the score on average, seconds when compiled."""
    draw, evaluations = make_samplers(config)[sampler]
    one = lambda score_fn, key: draw(key, score_fn, config.sde, (2,))
    many = jax.jit(jax.vmap(one, (None, 0)))
    keys = jax.random.split(jax.random.clone(key), config.num_samples)  # the same for all
    jax.block_until_ready(many(score_fn, jax.random.clone(keys)))
    start = time.perf_counter()
    found = jax.block_until_ready(many(score_fn, keys))
    seconds = time.perf_counter() - start
    if isinstance(found, ss.Solution):
        found, evaluations = found.x, float(jnp.mean(found.num_evals))
    return found, {"evaluations": evaluations, "seconds": seconds}


def _gallery(panels: dict[str, Array]) -> Figure:
    columns = min(6, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, points) in zip(axes, panels.items(), strict=False):
        plots.scatter_2d(points[:2_000], extent=EXTENT, ax=ax).set_title(title, fontsize=9)
    return figure


def _film(key: ss.Key, config: Config, score_fn: Partial) -> Figure:
    """The reverse SDE above the probability flow from the same noise; a colour for each mode that
    a sample ends in.
    """
    sde = config.sde
    saveat = sde.t0 + (sde.t1 - sde.t0) * jnp.array(FRAMES)
    keys = jax.random.split(key, min(config.num_samples, 1_000))
    figure = Figure(figsize=(2.2 * len(FRAMES), 4.9), layout="constrained")
    for solve, title, row in zip(
        (ss.solve_sde, ss.solve_ode),
        ("reverse SDE", "probability flow"),
        figure.subplots(2, len(FRAMES)),
        strict=True,
    ):
        one = lambda s, key, solve=solve: solve(key, s, sde, (2,), saveat=saveat).trajectory
        paths = jax.jit(jax.vmap(one, (None, 0)))(score_fn, jax.random.clone(keys))
        paths = np.asarray(paths)
        last = paths[:, -1]
        mode = np.round(np.arctan2(last[:, 1], last[:, 0]) / (np.pi / 4)).astype(int) % 8
        for ax, t, points in zip(row, saveat, paths.swapaxes(0, 1), strict=True):
            ax.scatter(*points.T, s=3, c=np.array(MODES)[mode], linewidths=0)
            limits = {"xlim": EXTENT[:2], "ylim": EXTENT[2:]}
            ax.set(title=f"$t = {t:.2f}$", aspect="equal", xticks=[], yticks=[], **limits)
        row[0].set_ylabel(title)
    return figure


def _table(config: Config, metrics: Metrics) -> str:
    """Energy distances to exact draws, in thousandths."""
    rows = [f"{'':20} evaluations   seconds   model, oracle: 1000 × energy distance"]
    for name in config.samplers:
        count, seconds = (metrics[f"model_{name}_{key}"] for key in ("evaluations", "seconds"))
        distances = (
            f"{1e3 * metrics[f'{score}_{name}_energy_distance']:8.2f} ± "
            f"{1e3 * metrics[f'{score}_{name}_energy_distance_stderr']:.2f}"
            for score in ("model", "oracle")
        )
        rows.append(f"{name:20} {count:11.1f} {seconds:9.3f} {'  '.join(distances)}")
    return "\n".join(rows)


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
