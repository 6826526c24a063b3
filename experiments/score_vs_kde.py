"""How well can the score of a d-dimensional standard normal be learnt from 10,000 points? Sliced
score matching beside kernel density and Stein estimates, implicit and denoising score matching,
the zero predictor and the statistical limit.

The protocol of a published table: 10,000 training points, 1,000 unseen ones, 50 epochs, one
Rademacher projection, the mean Euclidean distance to the true score −x. Published, at d = 2, 10,
20, 40: sliced score matching 0.12, 0.69, 1.23, 2.02; kernel density 0.26, 2.72, 3.89, 5.42.

The limit is the normal fitted by maximum likelihood to the same points. The network, the same for
all d and objectives, knows no normal: three swish layers and a linear skip. What it took:
decoupled weight decay on the layers alone, so that they bend the skip only where the data insist,
and a cosine schedule, which averages the projections' noise away.

Writes figure.png, metrics.json and config.json; ± is one standard error over seeds.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.tree_util import Partial
from jaxtyping import Array

import sde_score as ss
from experiments._run import Metrics, check_numbers, cli, results_folder, write_json
from sde_score import plots

PUBLISHED = {"sliced": (0.12, 0.69, 1.23, 2.02), "kde": (0.26, 2.72, 3.89, 5.42)}
PUBLISHED_DIMS = (2, 10, 20, 40)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    dims: tuple[int, ...] = PUBLISHED_DIMS
    num_seeds: int = 5
    num_train: int = 10_000
    num_test: int = 1_000
    epochs: int = 50
    batch_size: int = 128
    width: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 10.0
    stein_points: int = 2_000  # of the training points: the estimator factors their matrix
    seed: int = 0
    out: Path = Path("runs/score_vs_kde")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed", "weight_decay"))
        if self.num_seeds < 2 or self.batch_size > self.num_train or not self.dims:
            raise ValueError(
                "`num_seeds` must be at least 2, `batch_size` at most `num_train`, `dims` must "
                f"hold a number; got {self.num_seeds}, {self.batch_size}, {self.dims}."
            )


QUICK = Config(dims=(2, 10), num_seeds=2, num_train=2_000, epochs=20, stein_points=500)


class SkipMLP(nn.Module):
    """W x + b + MLP(x), which starts at 0."""

    width: int
    depth: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for _ in range(self.depth):
            h = nn.swish(nn.Dense(self.width)(h))
        zeros = nn.initializers.zeros
        skip = nn.Dense(x.size, kernel_init=zeros, name="skip")(x)
        return skip + nn.Dense(x.size, use_bias=False, kernel_init=zeros)(h)


def main(config: Config) -> Metrics:
    """Every column at every d; returns the metrics that it writes."""
    start = time.perf_counter()
    metrics: Metrics = {}
    with results_folder(config.out, config) as folder:
        for dim in config.dims:
            key = jax.random.fold_in(jax.random.key(config.seed), dim)
            for name, values in _row(key, config, dim).items():
                metrics[f"{name}_d{dim}"] = float(values.mean())
                metrics[f"{name}_d{dim}_stderr"] = float(values.std(ddof=1) / len(values) ** 0.5)
            ratio = metrics[f"sliced_d{dim}"] / metrics[f"limit_d{dim}"]
            metrics[f"sliced_over_limit_d{dim}"] = ratio
            print(_line(metrics, dim), flush=True)
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(_figure(config, metrics), folder / "figure.png")
        write_json(folder / "metrics.json", metrics)
    return metrics


def _row(key: ss.Key, config: Config, dim: int) -> dict[str, Array]:
    """The mean distance to the true score for each seed, by column."""
    train_key, test_key, fit_key = jax.random.split(key, 3)
    x = jax.random.normal(train_key, (config.num_seeds, config.num_train, dim))
    unseen = jax.random.normal(test_key, (config.num_seeds, config.num_test, dim))
    closed_forms = {
        "zero": lambda x: jnp.zeros_like,
        "kde": lambda x: ss.kernel_density_score(x, ss.silverman_bandwidth(x)),
        "stein": lambda x: ss.stein_score(x[: config.stein_points]),
        "limit": _maximum_likelihood,
    }
    row = {}
    for name, estimate in closed_forms.items():
        run = jax.jit(lambda x, unseen, estimate=estimate: _error(estimate(x), unseen))
        row[name] = jnp.stack([run(*pair) for pair in zip(x, unseen, strict=True)])
    sigma = ss.propose_sigma(x[0])
    objectives = {
        # at the cost of 2 Jacobian products a point: the exact trace takes d
        "implicit": (_implicit, min(1.0, 2.0 / dim)),
        "sliced": (_sliced, 1.0),
        "dsm": (partial(_denoising, sigma=sigma), 1.0),
    }
    net = SkipMLP(config.width)
    keys = jax.random.split(fit_key, len(objectives))
    for key, (name, (objective, share)) in zip(keys, objectives.items(), strict=True):
        params = _train(key, config, net, objective, x, share)
        error = jax.jit(jax.vmap(lambda params, x: _error(Partial(net.apply, params), x)))
        row[name] = error(params, unseen)
    return row


def _implicit(key: ss.Key, score_fn: Callable, x: Array) -> Array:
    return ss.implicit_score_matching(score_fn, x)


def _sliced(key: ss.Key, score_fn: Callable, x: Array) -> Array:
    return ss.sliced_score_matching(score_fn, x, ss.rademacher_probes(key, 1, x.shape))


def _denoising(key: ss.Key, score_fn: Callable, x: Array, sigma: Array) -> Array:
    return ss.single_sigma_score_matching(key, score_fn, x, sigma=sigma)


def _maximum_likelihood(x: Array) -> Callable:
    """The score of the normal of the points' mean and covariance."""
    precision = jnp.linalg.inv(jnp.cov(x, rowvar=False, bias=True))
    return lambda point: -precision @ (point - x.mean(0))


def _error(score_fn: Callable, x: Array) -> Array:
    """The mean distance to the true score, −x."""
    return jnp.mean(
        jax.lax.map(lambda x: jnp.linalg.norm(score_fn(x) + x), x, batch_size=min(100, len(x)))
    )


def _train(
    key: ss.Key, config: Config, net: SkipMLP, objective: Callable, x: Array, share: float
) -> ss.Params:
    """One network for each seed, all in one scan, for `share` of the epochs."""
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    num_steps = max(1, round(share * config.epochs * config.num_train / config.batch_size))
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=_decayed)

    def loss(params: ss.Params, key: ss.Key, batch: Array) -> Array:
        score_fn = Partial(net.apply, params)
        keys = jax.random.split(key, len(batch))
        return jnp.mean(jax.vmap(lambda key, x: objective(key, score_fn, x))(keys, batch))

    step = ss.make_train_step(loss, optimizer, ema_decay=0.999)

    @jax.jit
    @jax.vmap
    def fit(init_key: ss.Key, batch_key: ss.Key, loss_key: ss.Key, x: Array) -> ss.Params:
        batches = ss.data.batches(batch_key, x, config.batch_size)
        state = ss.init_train_state(net.init(init_key, x[0]), optimizer)
        advance = lambda state, i: (step(state, jax.random.fold_in(loss_key, i), batches(i))[0], 0)
        return jax.lax.scan(advance, state, jnp.arange(num_steps))[0].params

    keys = (jax.random.split(key, config.num_seeds) for key in (init_key, batch_key, loss_key))
    return fit(*keys, x)


def _decayed(params: ss.Params) -> ss.Params:
    """The layers' matrices: neither biases nor the linear skip."""
    name = jax.tree_util.keystr
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" in name(path) and "skip" not in name(path), params
    )


COLUMNS = {
    "zero": "zero predictor",
    "kde": "kernel density",
    "stein": "Stein estimator",
    "implicit": "implicit",
    "dsm": "denoising",
    "sliced": "sliced",
    "limit": "statistical limit",
}


def _line(metrics: Metrics, dim: int) -> str:
    show = lambda name: f"{metrics[name]:.3f} ± {metrics[f'{name}_stderr']:.3f}"
    cells = "  ".join(f"{name} {show(f'{name}_d{dim}')}" for name in COLUMNS)
    return f"d = {dim}: {cells}  (sliced/limit {metrics[f'sliced_over_limit_d{dim}']:.2f})"


def _figure(config: Config, metrics: Metrics) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(7.5, 5.0), layout="constrained")
    styles = dict.fromkeys(COLUMNS, "o-") | {"zero": "k:", "limit": "k--"}
    for name, label in COLUMNS.items():
        values = [metrics[f"{name}_d{dim}"] for dim in config.dims]
        errors = [metrics[f"{name}_d{dim}_stderr"] for dim in config.dims]
        line = ax.errorbar(config.dims, values, errors, fmt=styles[name], label=label)[0]
        if name in PUBLISHED:
            shown = [i for i, dim in enumerate(PUBLISHED_DIMS) if dim in config.dims]
            places = [PUBLISHED_DIMS[i] for i in shown], [PUBLISHED[name][i] for i in shown]
            ax.plot(*places, "x", color=line.get_color(), label=f"{label}, published")
    ax.set(xscale="log", yscale="log", xlabel="dimension d")
    ax.set(ylabel="mean distance to the true score", title="The score of a standard normal")
    ax.set_xticks(config.dims, [str(dim) for dim in config.dims])
    ax.set_xticks([], minor=True)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
