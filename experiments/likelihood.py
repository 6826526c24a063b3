"""Likelihoods to trust: of digits with a budget of the errors, beside the bound that training
maximises; of a table beside a mixture's and a kernel density's.

The table is scikit-learn's breast cancer data: logarithms of six mean measurements, dequantised
over a step of their last digit. (Perimeter and area follow from the radius: with them the density
is almost degenerate, and the learned flow takes some held-out rows to infinity.) Writes
figure.png, metrics.json, config.json and the digits' score.safetensors.
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
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits

import sde_score as ss
from experiments import digits, toy_2d
from experiments._run import (
    Metrics,
    as_dict,
    check_numbers,
    cli,
    estimate,
    results_folder,
    write_json,
)
from sde_score import plots
from sde_score.evaluation import DatasetLikelihood, ErrorBudget

COLUMNS = (0, 1, 4, 5, 8, 9)  # not the two with zeros, which are atoms
BITS = 1 / (digits.DIMS * np.log(2.0))  # a nat of a digit, in bits/dim
MIXTURES = {"n_components": [1, 2, 3, 4, 6], "reg_covar": [1e-5, 1e-4, 1e-3]}
TABLE_SDE = ss.VP(t0=1e-4)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    digits_steps: int = 8000
    num_test: int = 297  # held-out digits
    num_probes: int = 4
    num_passes: int = 2
    num_draws: int = 64  # of the bound, for each digit
    num_samples: int = 100
    num_held_out: int = 142  # rows of the table
    width: int = 64  # of the table's network; settings chosen on another split of its rows
    depth: int = 2
    num_steps: int = 1000
    learning_rate: float = 1e-3
    seed: int = 0
    params: Path | None = None  # the digits' score.safetensors, instead of training
    out: Path = Path("runs/likelihood")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if min(self.num_probes, self.num_passes, self.num_samples) < 2:
            raise ValueError("`num_probes`, `num_passes`, `num_samples` must be at least 2.")
        if not (10 <= self.num_test <= 297 and 10 <= self.num_held_out <= 400):
            raise ValueError("`num_test` must lie in 10 … 297, `num_held_out` in 10 … 400.")


QUICK = Config(digits_steps=300, num_test=60, num_probes=2, num_samples=10)


def main(config: Config) -> Metrics:
    """Train, evaluate, compare; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        table_key, digits_key = jax.random.split(jax.random.key(config.seed))
        params, metrics = _digits(digits_key, config)
        metrics["digits_seconds"] = time.perf_counter() - start
        log_probs, table = _table(table_key, config)
        low, high = map(float, table.interval)
        metrics |= {"table_interval_low": low, "table_interval_high": high}
        metrics |= {f"table_{name}_term": term for name, term in table.budget._asdict().items()}
        for name, values in log_probs.items():
            metrics |= estimate(f"table_{name}_nats", values)
            if name != "model":
                metrics |= estimate(f"table_above_{name}", log_probs["model"] - values)
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(_figure(metrics, log_probs), folder / "figure.png")
        ss.save_params(folder / "score.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _digits(key: ss.Key, config: Config) -> tuple[ss.Params, Metrics]:
    """The budget, the bound and the likelihoods found while sampling, all in bits/dim."""
    train_key, eval_key, data_key, bound_key, sample_key = jax.random.split(key, 5)
    setup = digits.Config(num_steps=config.digits_steps, params=config.params)
    net = ss.nets.MLP(setup.width, setup.depth, setup.dropout)
    train, test = ss.data.digits()
    levels, sde = test.images[: config.num_test], digits.SDE
    params, *_ = digits.train_score(train_key, setup, net, train)
    score_fn = digits.bounded(digits.make_score(net, setup, params))
    probes = {"num_probes": config.num_probes}
    passes = {"dequantize": digits.to_model, "num_passes": config.num_passes}
    out = ss.dataset_log_likelihood(eval_key, score_fn, sde, levels, **passes, **probes)
    metrics = estimate("bits_per_dim", digits.bits(jnp.asarray(out.log_probs)))
    high, low = (float(digits.bits(jnp.asarray(end))) for end in out.interval)
    metrics |= {"interval_low": low, "interval_high": high, "num_evals": out.num_evals}
    metrics |= {f"{name}_term": BITS * value for name, value in out.budget._asdict().items()}

    bound = partial(ss.log_likelihood_bound, num_draws=config.num_draws)
    keys, x0 = jax.random.split(bound_key, len(levels)), digits.to_model(data_key, levels)
    bounds = jax.jit(jax.vmap(bound, (0, None, None, 0)))(keys, score_fn, sde, x0)
    metrics |= estimate("bound_bits_per_dim", digits.bits(bounds.log_prob))

    def twice(key: ss.Key, score_fn: Partial) -> tuple[Array, Array]:
        """log p as found while sampling, and of the finished sample by other probes."""
        first, second = jax.random.split(key)
        x, found = ss.sample_with_log_likelihood(first, score_fn, sde, (8, 8, 1), **probes)
        again = ss.log_likelihood(second, score_fn, sde, x, **probes)
        return found.log_prob, again.log_prob

    keys = jax.random.split(sample_key, config.num_samples)
    found, again = jax.jit(jax.vmap(twice, (0, None)))(keys, score_fn)
    metrics |= estimate("sampled_bits_per_dim", digits.bits(found))
    return params, metrics | estimate("sampled_difference", BITS * (again - found))


def _table(key: ss.Key, config: Config) -> tuple[dict[str, Array], DatasetLikelihood]:
    """Log-densities of held-out rows, standardised, in nats, and the score model's budget."""
    order_key, noise_key, train_key, eval_key = jax.random.split(key, 4)
    rows = load_breast_cancer().data[:, COLUMNS]
    step = np.array([np.diff(np.unique(column)).min() for column in rows.T])
    rows += step * (np.asarray(jax.random.uniform(noise_key, rows.shape)) - 0.5)
    rows = jax.random.permutation(order_key, jnp.asarray(np.log(rows), jnp.float32))
    scale = jax.vmap(ss.data.standardize(rows[config.num_held_out :]))
    test, train = scale(rows[: config.num_held_out]), scale(rows[config.num_held_out :])
    options = {"num_steps": config.num_steps, "learning_rate": config.learning_rate}
    net = {"width": config.width, "depth": config.depth}
    setup = toy_2d.Config(sde=TABLE_SDE, batch_size=128, **net, **options)
    score_fn = toy_2d.make_score(setup, toy_2d.train_score(train_key, setup, train))
    model = ss.dataset_log_likelihood(eval_key, score_fn, TABLE_SDE, test, num_probes=None)
    search = GridSearchCV(GaussianMixture(random_state=config.seed), MIXTURES)
    with threadpool_limits(1):  # small matrices: threads that spin cost ten times the work
        search.fit(np.asarray(train, np.float64))  # by five folds
    kernels = ss.kernel_density_log_prob(train, ss.cross_validated_bandwidth(train))
    mixture = search.best_estimator_.score_samples(np.asarray(test, np.float64))
    log_probs = {"model": jnp.asarray(model.log_probs), "gmm": jnp.asarray(mixture)}
    return log_probs | {"kde": jax.vmap(kernels)(test)}, model


def _figure(metrics: Metrics, log_probs: dict[str, Array]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = {name: metrics[f"{name}_term"] for name in ErrorBudget._fields}
    terms["standard error"] = metrics["bits_per_dim_stderr"]
    left.barh(list(terms), list(terms.values()), color=plots.BLUE)
    flow, bound = (
        f"{metrics[name]:.3f} ± {metrics[f'{name}_stderr']:.3f}"
        for name in ("bits_per_dim", "bound_bits_per_dim")
    )
    left.set(xscale="log", xlabel="errors of the flow's mean over digits, bits/dim")
    left.set_title(f"digits: flow {flow},\nbound {bound} (two densities, in any order)")
    right.scatter(log_probs["gmm"], log_probs["model"], s=8, color=plots.BLUE, linewidths=0)
    right.axline((0, 0), slope=1, color=plots.DARK, linewidth=0.8)
    right.set(xlabel="Gaussian mixture, nats", ylabel="score model, nats")
    right.set_title("held-out rows of the table")
    return figure


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
