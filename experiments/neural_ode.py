"""A neural ODE classifies handwritten digits, and diffrax's three adjoints differentiate it.

The 64 pixels flow from t = 0 to t = 1 along a network's field; a linear read-out and the
cross-entropy follow (Chen et al. 2018, arXiv 1806.07366, sec. 3). Writes loss.png, metrics.json,
config.json and params.safetensors.
"""

import dataclasses
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array

import sde_score as ss
from experiments._run import Metrics, as_dict, check_numbers, cli, results_folder, write_json
from sde_score import plots

ADJOINTS = {
    "recursive": diffrax.RecursiveCheckpointAdjoint(),  # of the solve: checkpoints, recomputed
    "backsolve": diffrax.BacksolveAdjoint(),  # the adjoint ODE, in constant memory
    "direct": diffrax.DirectAdjoint(),  # of the solve, which JAX's own autodiff records
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    width: int = 64
    depth: int = 1
    num_steps: int = 600
    batch_size: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    tolerance: float = 1e-3  # of the solves, in training and evaluation
    max_steps: int = 32  # DirectAdjoint stores them all
    repeats: int = 5  # of each timing
    seed: int = 0
    out: Path = Path("runs/neural_ode")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed", "weight_decay"))


QUICK = Config(num_steps=50, batch_size=32, repeats=1)


def main(config: Config) -> Metrics:
    """Train, test, compare the adjoints; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        train, test = ((x.reshape(-1, 64) / 16.0, labels) for x, labels in ss.data.digits())
        init_key, batch_key, fit_key = jax.random.split(jax.random.key(config.seed), 3)
        net = ss.nets.ConcatSquash(config.width, config.depth)
        params = {"field": net.init(init_key, train[0][0], 0.0), "readout": jnp.zeros((10, 65))}
        schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
        loss = lambda params, key, batch: cross_entropy(config, params, batch)
        batches, num_steps = ss.data.batches(batch_key, train, config.batch_size), config.num_steps
        state, losses = ss.fit(fit_key, loss, params, optimizer, batches, num_steps=num_steps)
        metrics: Metrics = {"train_seconds": time.perf_counter() - start}
        scores, evals = jax.jit(lambda params, x: logits(config, params, x))(state.params, test[0])
        right = jnp.argmax(scores, 1) == test[1]
        stderr = float(right.std() / np.sqrt(right.size))
        metrics |= {"test_accuracy": float(right.mean()), "test_accuracy_stderr": stderr}
        metrics["num_evals"] = float(evals.mean())
        metrics |= compare(config, state.params, batches(0))
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(plots.loss_curve(losses).figure, folder / "loss.png")
        ss.save_params(folder / "params.safetensors", state.params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def logits(
    config: Config, params: ss.Params, x: Array, adjoint: diffrax.AbstractAdjoint | None = None
) -> tuple[Array, Array]:
    """The ten scores of each image [n, 64], linear in where it ends; the field's evaluations."""
    field = Partial(ss.nets.ConcatSquash(config.width, config.depth).apply, params["field"])
    options = {"rtol": config.tolerance, "atol": config.tolerance, "max_steps": config.max_steps}

    def one(x: Array) -> tuple[Array, Array]:
        moved = ss.integrate(field, x, start=0.0, stop=1.0, adjoint=adjoint, **options)
        return params["readout"] @ jnp.append(moved.x, 1.0), moved.num_evals

    return jax.vmap(one)(x)


def cross_entropy(
    config: Config, params: ss.Params, batch: tuple[Array, Array], adjoint: str = "recursive"
) -> Array:
    """The mean of −log p(label), in nats."""
    scores, _ = logits(config, params, batch[0], ADJOINTS[adjoint])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()


def compare(config: Config, params: ss.Params, batch: tuple[Array, Array]) -> Metrics:
    """Milliseconds of each adjoint's gradient, its relative distance from the first one's."""
    metrics, first = {}, None
    for name in ADJOINTS:
        grad = jax.jit(jax.grad(lambda p, b, name=name: cross_entropy(config, p, b, name)))
        leaves = jax.tree.leaves(jax.block_until_ready(grad(params, batch)))
        start = time.perf_counter()
        for _ in range(config.repeats):
            jax.block_until_ready(grad(params, batch))
        metrics[f"{name}_ms"] = 1e3 * (time.perf_counter() - start) / config.repeats
        found = np.concatenate([np.ravel(leaf) for leaf in leaves])
        first = found if first is None else first
        metrics[f"{name}_error"] = float(np.linalg.norm(found - first) / np.linalg.norm(first))
    return metrics


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
