"""A doctor for scores: what `ss.diagnose` says of one that is exact, or has a planted fault, or
was trained for a short or a long time.

The data are eight Gaussians, so that the truth is known beside what is found without it. The
faults: a score 1.1 times too long; sigma never below a floor, so wrong at small t; a band of t in
which the score is too short and noisy, as if undertrained. Writes figure.png (a column for each
case), metrics.json and config.json.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array

import sde_score as ss
from experiments._run import Metrics, check_numbers, cli, results_folder, write_json
from sde_score import plots


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    sde: ss.VP | ss.SubVP | ss.VE = ss.VP()
    factor: float = 1.1
    floor: float = 0.1  # of sigma, in data units: the Gaussians have 0.175
    band: tuple[float, float] = (0.1, 0.4)  # of t
    short_steps: int = 300
    long_steps: int = 5_000
    width: int = 64
    depth: int = 3
    num_train: int = 10_000
    num_test: int = 8_192
    num_levels: int = 20
    num_keys: int = 20  # to count the exact score's false alarms
    seed: int = 0
    out: Path = Path("runs/diagnose")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if self.num_levels < 2 or self.num_test < 10:
            raise ValueError("`num_levels` must be at least 2, `num_test` 10. Raise them.")


QUICK = Config(long_steps=500, short_steps=50, width=32, num_test=4_096, num_keys=3)


@ss.register_pytree
@dataclasses.dataclass(frozen=True)
class Floored:
    """As much of an SDE as a marginal needs, with a sigma of at least `floor`."""

    sde: ss.SDE
    floor: float

    t0 = property(lambda self: self.sde.t0)
    t1 = property(lambda self: self.sde.t1)
    alpha = lambda self, t: self.sde.alpha(t)
    sigma = lambda self, t: jnp.maximum(self.sde.sigma(t), self.floor)


def main(config: Config) -> Metrics:
    """Diagnose every case; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        keys = jax.random.split(jax.random.key(config.seed), 5)
        train_key, test_key, fit_key, key, alarm_key = keys
        x0, gmm = ss.data.eight_gaussians(train_key, config.num_train), _eight_gaussians()
        ts = ss.log_snr_grid(config.sde, config.num_levels - 1)
        shared = {"ts": ts, "truth": ss.exact_score(gmm, config.sde)}
        examine = lambda key, score_fn, x: _diagnose(key, score_fn, config.sde, x, **shared)
        faults, found, metrics = _faults(config), {}, {}
        cases = {name: _planted(gmm, config, *fault) for name, fault in faults.items()}
        short_key, long_key = jax.random.split(fit_key)
        cases["short training"] = _train(short_key, config, x0, config.short_steps)
        cases["long training"] = _train(long_key, config, x0, config.long_steps)
        test = ss.data.eight_gaussians(test_key, config.num_test)
        for name, score_fn in cases.items():
            found[name] = examine(jax.random.clone(key), score_fn, test)  # the same noise for all
            print(f"{name}:\n{ss.summarize_diagnosis(found[name])}", flush=True)
            wrong = _is_wrong(config, ts, *faults[name]) if name in faults else None
            metrics |= _metrics(name.replace(" ", "_"), found[name], wrong)
        metrics |= _false_alarms(alarm_key, config, lambda key, x: examine(key, cases["exact"], x))
        metrics["total_seconds"] = time.perf_counter() - start
        plots.save(_figure(found), folder / "figure.png")
        write_json(folder / "metrics.json", metrics)
    return metrics


@jax.jit
def _diagnose(
    key: ss.Key, score_fn: Partial, sde: ss.SDE, x: Array, ts: Array, truth: Partial
) -> ss.Diagnosis:
    return ss.diagnose(key, score_fn, sde, x, ts=ts, true_score=truth)


def _eight_gaussians() -> ss.GaussianMixture:
    """The law of `ss.data.eight_gaussians`."""
    angles = np.arange(8) * np.pi / 4
    means = 1.4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return ss.GaussianMixture(np.full(8, 1 / 8), means, np.tile(0.175**2 * np.eye(2), (8, 1, 1)))


def _faults(config: Config) -> dict[str, tuple]:
    """The factor, the floor of sigma and the band of each case; past t1 there is nothing."""
    never = (2.0 * config.sde.t1, 2.0 * config.sde.t1)
    faults = {"exact": (1.0, 0.0, never), "factor": (config.factor, 0.0, never)}
    return faults | {"floor": (1.0, config.floor, never), "band": (1.0, 0.0, config.band)}


def _planted(
    gmm: ss.GaussianMixture, config: Config, factor: float, floor: float, band: tuple
) -> Partial:
    exact = ss.exact_score(gmm, Floored(config.sde, floor))
    return Partial(_score, exact, config.sde, factor, band)


def _score(
    exact: Partial, sde: ss.SDE, factor: Array, band: tuple[Array, Array], x: Array, t: Array
) -> Array:
    score = factor * exact(x, t)
    short = 0.7 * score + 0.1 * jnp.sin(7.0 * x) / sde.sigma(t)
    return jnp.where((band[0] < t) & (t < band[1]), short, score)


def _is_wrong(config: Config, ts: Array, factor: float, floor: float, band: tuple) -> Array:
    inside = (band[0] < ts) & (ts < band[1])
    return (factor != 1.0) | (config.sde.sigma(ts) < floor) | inside


def _train(key: ss.Key, config: Config, x0: Array, num_steps: int) -> Partial:
    init_key, batch_key, fit_key = jax.random.split(key, 3)
    net = ss.nets.MLP(config.width, config.depth)
    score = lambda params: ss.score_from_preconditioned(
        config.sde, Partial(net.apply, params), sigma_data=1.0
    )
    loss = lambda params, key, batch: ss.dsm_loss(
        key, score(params), config.sde, batch, times=ss.likelihood_times
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    batches = ss.data.batches(batch_key, x0, min(512, len(x0)))
    params = net.init(init_key, x0[0], 0.0)
    state, _ = ss.fit(fit_key, loss, params, optimizer, batches, num_steps=num_steps)
    return score(state.params)


def _metrics(name: str, diagnosis: ss.Diagnosis, wrong: Array | None) -> Metrics:
    """The worst level's z, time and gain; the mean squares over the levels; of a planted fault,
    how many of its levels are found, and what is said of the others.
    """
    largest, suspect = jnp.max(jnp.abs(diagnosis.z_scores), axis=1), diagnosis.suspect
    worst = jnp.argmax(largest)
    values = {"max_z": largest[worst], "worst_t": diagnosis.times[worst]}
    values |= {"gain": diagnosis.gain.value[worst], "gain_stderr": diagnosis.gain.stderr[worst]}
    for square in ("fisher", "bound", "fokker_planck"):
        values[square] = getattr(diagnosis, square).value.mean()
    values["suspect_levels"] = jnp.sum(suspect)
    if wrong is not None:
        values |= {"faulty_levels": jnp.sum(wrong), "found": jnp.sum(wrong & suspect)}
        values["false_alarms"] = jnp.sum(~wrong & suspect)
        values["max_z_elsewhere"] = jnp.max(jnp.where(wrong, 0.0, largest))
    return {f"{name}_{key}": float(value) for key, value in values.items()}


def _false_alarms(key: ss.Key, config: Config, examine: Callable) -> Metrics:
    """How many runs on new data accuse the exact score, and their largest |z|."""
    largest, alarms = [], 0
    for i in range(config.num_keys):
        data_key, run_key = jax.random.split(jax.random.fold_in(key, i))
        diagnosis = examine(run_key, ss.data.eight_gaussians(data_key, config.num_test))
        largest.append(float(jnp.max(jnp.abs(diagnosis.z_scores))))
        alarms += int(diagnosis.suspect.any())
    return {"exact_keys_alarmed": float(alarms), "exact_keys_max_z": max(largest)}


def _figure(found: dict[str, ss.Diagnosis]) -> plt.Figure:
    size = (2.6 * len(found), 7.0)
    figure, axes = plt.subplots(
        3, len(found), figsize=size, layout="constrained", sharex=True, sharey="row"
    )
    for column, (name, diagnosis) in zip(axes.T, found.items(), strict=True):
        plots.diagnosis(diagnosis, axes=column)
        column[0].set_title(name)
    for ax in axes[:, 1:].flat:
        ax.set(ylabel="")
    for ax in axes[2, 1:]:
        ax.get_legend().remove()
    axes[2, 0].set_ylim(1e-9, 30.0)
    return figure


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
