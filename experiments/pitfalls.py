"""Four pitfalls of score-based modelling (Song & Ermon 2019, arXiv 1907.05600, sec. 3), each
measured against a closed form.

1. line.png: data on a line of the plane. With noise sigma the score grows like 1/sigma; without
   noise sliced score matching has no minimum.
2. low_density.png: a trained score is wrong where data are rare.
3. weights.png: Langevin dynamics with the exact score misses the weights of separated modes;
   annealed over noise levels it finds them, as the reverse SDE does.
4. sigma.png: denoising score matching at one sigma. Much noise biases the score, little noise
   makes the variance of the gradient explode; sliced score matching needs no sigma.

Writes these, metrics.json, config.json and a network of pitfall 2, score.safetensors. Standard
errors are over networks where some are trained, else over draws. Scores are per unit of the data.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from matplotlib.figure import Figure

import sde_score as ss
from experiments import _pitfall_figures as figures
from experiments._run import Metrics, as_dict, check_numbers, cli, results_folder, write_json
from sde_score import plots

Found = tuple[Metrics, Figure]

DIRECTION = np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)])  # of pitfall 1's line
WEIGHT, EXTENT = 0.8, (-8.0, 8.0, -8.0, 8.0)  # of the mixture of pitfalls 2 to 4
BINS = (-90.0, -70.0, -50.0, -30.0, -15.0, -7.0, -2.0)  # of pitfall 2's log p, in nats


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    width: int = 64
    depth: int = 2
    num_networks: int = 4  # trained for each case
    num_steps: int = 3_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    line_sigmas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)  # besides no noise
    sigmas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of pitfall 4
    num_samples: int = 20_000
    langevin_step_size: float = 0.1
    langevin_steps: int = 1_000
    seed: int = 0
    out: Path = Path("runs/pitfalls")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        for name in ("num_networks", "num_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"`{name}` must be at least 2, for standard errors. Raise it.")
        for name in ("line_sigmas", "sigmas"):
            values = getattr(self, name)
            if len(values) < 2 or not all(0 < value < math.inf for value in values):
                raise ValueError(f"`{name}` must be two numbers or more above 0; got {values}.")

    @property
    def net(self) -> ss.nets.MLP:
        return ss.nets.MLP(self.width, self.depth)


QUICK = Config(
    num_networks=2,
    num_steps=500,
    line_sigmas=(0.1, 0.3),
    sigmas=(0.01, 0.1, 1.0),
    num_samples=4_000,
    langevin_steps=500,
)


def main(config: Config) -> Metrics:
    """Train, measure and draw; prints a summary and returns the metrics."""
    start = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(config.seed), 9))
    with results_folder(config.out, config) as folder:
        line = jax.random.normal(next(keys), (config.num_samples, 1)) * DIRECTION[None]
        data = _draw(next(keys), mixture(), config.num_samples)
        sigmas = (*config.line_sigmas, 0.0, 0.0)
        cases = jnp.stack([line] * (len(sigmas) - 1) + [data])
        init_keys = jax.random.split(next(keys), config.num_networks)
        init = jax.jit(jax.vmap(lambda key: config.net.init(key, jnp.zeros(2), 0.0)))(init_keys)
        sliced, losses = _train(next(keys), config, init, _sliced, cases, sigmas)
        cases = jnp.stack([data] * len(config.sigmas))
        denoising, _ = _train(next(keys), config, init, _denoising, cases, config.sigmas)
        found = {
            "line": _line(next(keys), config, sliced, losses),
            "low_density": _low_density(next(keys), config, _row(sliced, -1)),
            "weights": _weights(next(keys), config),
            "sigma": _sigma(next(keys), config, _row(sliced, -1), denoising),
        }
        metrics = {key: value for values, _ in found.values() for key, value in values.items()}
        captions = _captions(config, metrics)
        for name, (_, figure) in found.items():
            figure.supxlabel(captions[name], x=0.02, ha="left", fontsize=9, family="monospace")
            plots.save(figure, folder / f"{name}.png")
        metrics["total_seconds"] = time.perf_counter() - start
        ss.save_params(folder / "score.safetensors", _row(_row(sliced, -1), 0), as_dict(config))
        write_json(folder / "metrics.json", metrics)
    print("\n\n".join(captions.values()))
    return metrics


def mixture(sigma: float = 0.0) -> ss.GaussianMixture:
    """0.2 N((−5, −5), I) + 0.8 N((5, 5), I), the data of pitfalls 2 to 4, with noise."""
    means = np.array([[-5.0, -5.0], [5.0, 5.0]])
    covariances = np.stack([(1 + sigma**2) * np.eye(2)] * 2)
    return ss.GaussianMixture(np.array([1 - WEIGHT, WEIGHT]), means, covariances)


def noised_line(sigma: float) -> ss.GaussianMixture:
    """The law of r u + sigma z with r ~ N(0, 1) and u the unit vector along pitfall 1's line."""
    covariance = np.outer(DIRECTION, DIRECTION) + sigma**2 * np.eye(2)
    return ss.GaussianMixture(np.ones(1), np.zeros((1, 2)), covariance[None])


def _train(
    key: ss.Key, config: Config, init: ss.Params, loss: Callable, cases: Array, sigmas: tuple
) -> tuple[ss.Params, Array]:
    """The networks `init`, trained for each case, its data [n, 2] and its sigma, all at once: the
    averaged parameters, with leading axes [k, num_networks], and losses [k, num_networks,
    num_steps].
    """
    optimizer = optax.adam(config.learning_rate)
    train_step = ss.make_train_step(partial(loss, config.net), optimizer)

    def one(key: ss.Key, init: ss.Params, data: Array, sigma: Array) -> tuple[ss.Params, Array]:
        batch_key, fit_key = jax.random.split(key)

        def body(state: ss.TrainState, step: Array) -> tuple[ss.TrainState, Array]:
            index_key, step_key = (jax.random.fold_in(k, step) for k in (batch_key, fit_key))
            index = jax.random.randint(index_key, (config.batch_size,), 0, len(data))
            state, metrics = train_step(state, step_key, (data[index], sigma))
            return state, metrics["loss"]

        state = ss.init_train_state(init, optimizer)
        state, losses = jax.lax.scan(body, state, jnp.arange(config.num_steps))
        return state.ema_params, losses

    keys = jax.random.split(key, (len(sigmas), config.num_networks))
    train = jax.jit(jax.vmap(jax.vmap(one, (0, 0, None, None)), (0, None, 0, 0)))
    return train(keys, init, cases, jnp.asarray(sigmas))


def _sliced(net: ss.nets.MLP, params: ss.Params, key: ss.Key, batch: tuple) -> Array:
    """Sliced score matching of data with noise sigma, which may be 0."""
    x, sigma = batch
    noise_key, probe_key = jax.random.split(key)
    x = x + sigma * jax.random.normal(noise_key, x.shape)
    probes = ss.rademacher_probes(probe_key, 1, x.shape)
    one = lambda x, v: ss.sliced_score_matching(lambda x: net.apply(params, x, 0.0), x, v)
    return jax.vmap(one, (0, 1))(x, probes).mean()


def _denoising(net: ss.nets.MLP, params: ss.Params, key: ss.Key, batch: tuple) -> Array:
    """Denoising score matching at one sigma."""
    x, sigma = batch
    score_fn = lambda x: net.apply(params, x, 0.0)
    one = lambda key, x: ss.single_sigma_score_matching(key, score_fn, x, sigma=sigma)
    return jax.vmap(one)(jax.random.split(key, len(x)), x).mean()


@partial(jax.jit, static_argnums=0)
def _scores(net: ss.nets.MLP, params: ss.Params, x: Array) -> Array:
    """Scores [num_networks, n, 2] at x [n, 2]."""
    one = lambda params, x: net.apply(params, x, 0.0)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(params, x)


@jax.jit
def _exact(gmm: ss.GaussianMixture, x: Array) -> tuple[Array, Array]:
    """Scores [n, 2] and log-densities [n] at x [n, 2]."""
    return jax.vmap(gmm.score)(x), jax.vmap(gmm.log_prob)(x)


@partial(jax.jit, static_argnums=2)
def _draw(key: ss.Key, gmm: ss.GaussianMixture, num: int) -> Array:
    return jax.vmap(gmm.sample)(jax.random.split(key, num))


def _row(params: ss.Params, index: int) -> ss.Params:
    return jax.tree.map(lambda leaf: leaf[index], params)


def _rms(vectors: Array) -> Array:
    """√(mean ‖v‖²) of n vectors, [..., n, d] -> [...]."""
    return jnp.sqrt(jnp.mean(jnp.sum(vectors**2, -1), -1))


def _entry(name: str, values: Array) -> Metrics:
    """A mean and its standard error."""
    stderr = jnp.std(values, ddof=1) / jnp.sqrt(values.size)
    return {name: float(values.mean()), f"{name}_stderr": float(stderr)}


def _line(key: ss.Key, config: Config, params: ss.Params, losses: Array) -> Found:
    """Pitfall 1. With noise, the score's mean square is a = 1/(1 + sigma²) + 1/sigma², and the
    least loss −a/2.
    """
    fifth, metrics = -(-config.num_steps // 5), {}
    for i, sigma in enumerate(config.line_sigmas):
        name, square = f"{sigma:g}", 1 / (1 + sigma**2) + 1 / sigma**2
        x = _draw(jax.random.fold_in(key, i), noised_line(sigma), config.num_samples)
        scores, (truth, _) = _scores(config.net, _row(params, i), x), _exact(noised_line(sigma), x)
        metrics |= _entry(f"line_norm_{name}", _rms(scores))
        metrics |= _entry(f"line_error_{name}", _rms(scores - truth[None]) / _rms(truth))
        metrics |= _entry(f"line_loss_{name}", losses[i, :, -fifth:].mean(-1))
        metrics |= {f"line_norm_exact_{name}": square**0.5, f"line_loss_exact_{name}": -square / 2}
    metrics |= _entry("line_loss_0_early", losses[-2, :, :fifth].mean(-1))
    metrics |= _entry("line_loss_0", losses[-2, :, -fifth:].mean(-1))
    field, means = noised_line(0.3).score, np.asarray(losses[:-1].mean(1))
    return metrics, figures.line(metrics, config.line_sigmas, DIRECTION, field, means)


def _low_density(key: ss.Key, config: Config, params: ss.Params) -> Found:
    """Pitfall 2: norms of the score's error for data, and over the plane by the log-density."""
    data = _draw(key, mixture(), config.num_samples)
    axis = np.linspace(*EXTENT[:2], 100, dtype=np.float32)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    (scores, heights), norm = _exact(mixture(), grid), partial(jnp.linalg.norm, axis=-1)
    errors = norm(_scores(config.net, params, grid) - scores[None])
    at_data = norm(_scores(config.net, params, data) - _exact(mixture(), data)[0][None])
    rare = float(jnp.quantile(_exact(mixture(), data)[1], 0.01))
    metrics = {"log_density_rare": rare} | _entry("ssm_error_data", at_data.mean(1))
    metrics |= _entry("ssm_error_rare", errors[:, heights < rare].mean(1))
    for low, high in itertools.pairwise(BINS):
        name, inside = f"{(low + high) / 2:g}", (heights >= low) & (heights < high)
        metrics |= _entry(f"ssm_error_at_{name}", errors[:, inside].mean(1))
        metrics[f"score_norm_at_{name}"] = float(norm(scores[inside]).mean())
    maps = (np.asarray(values).reshape(100, 100) for values in (errors.mean(0), heights))
    score = mixture().score
    return metrics, figures.low_density(metrics, BINS, EXTENT, data[:1_000], score, *maps)


def _langevin(key: ss.Key, config: Config) -> Array:
    start_key, key = jax.random.split(key)
    x = jax.random.uniform(start_key, (2,), minval=EXTENT[0], maxval=EXTENT[1])
    options = {"step_size": config.langevin_step_size, "num_steps": config.langevin_steps}
    return ss.langevin_sample(key, mixture().score, x, **options)


def _annealed_langevin(key: ss.Key, config: Config) -> Array:
    sde = ss.VE(sigma_min=0.3, sigma_max=15.0, t0=0.0)
    options = {"ts": ss.uniform_grid(sde, 19), "step_size": 0.3 * 0.3**2}
    num_steps = config.langevin_steps // 10  # at each of 20 levels: twice the moves of `_langevin`
    score = ss.exact_score(mixture(), sde)
    return ss.annealed_langevin_sample(key, score, sde, (2,), num_steps=num_steps, **options)


def _reverse_sde(key: ss.Key, config: Config) -> Array:
    return ss.sample(key, ss.exact_score(mixture(), ss.VP()), ss.VP(), (2,))


SAMPLERS = {  # (key, config) -> one draw by the exact score: the columns of pitfall 3
    "langevin": _langevin,
    "annealed_langevin": _annealed_langevin,
    "reverse_sde": _reverse_sde,
}


def _weights(key: ss.Key, config: Config) -> Found:
    """Pitfall 3: the share of draws near the heavy mode, and how many standard errors of a fair
    sample it is off.
    """
    num, metrics = config.num_samples, {}
    data_key, *keys = jax.random.split(key, 1 + len(SAMPLERS))
    draws = {"data": _draw(data_key, mixture(), num)}
    for key, (name, sampler) in zip(keys, SAMPLERS.items(), strict=True):
        draw = jax.jit(jax.vmap(partial(sampler, config=config)))
        draws[name] = draw(jax.random.split(key, num))
        metrics |= _entry(f"weight_{name}", (draws[name].sum(1) > 0).astype(float))
        stderr = (WEIGHT * (1 - WEIGHT) / num) ** 0.5
        metrics[f"weight_{name}_z"] = (metrics[f"weight_{name}"] - WEIGHT) / stderr
    return metrics, figures.weights(metrics, draws, WEIGHT, EXTENT)


def _sigma(key: ss.Key, config: Config, sliced: ss.Params, denoising: ss.Params) -> Found:
    """Pitfall 4, for each sigma: the target's variance given x̃, which is twice the loss of the
    exact score; the variance of one example's gradient, for a network of pitfall 2; the error of
    the trained score, and its bias, that of the exact score with the noise.
    """
    data_key, ssm_key, key = jax.random.split(key, 3)
    x = _draw(data_key, mixture(), config.num_samples)
    truth, _ = _exact(mixture(), x)
    error = lambda params: _rms(_scores(config.net, params, x) - truth[None])
    spread = partial(_gradient_spread, config.net, _row(sliced, 0), x[:1_000])
    metrics = _entry("ssm_error", error(sliced)) | {"score_norm": float(_rms(truth))}
    metrics |= _entry("ssm_gradient_variance", spread(ssm_key, 0.0, loss=_sliced))
    for i, sigma in enumerate(config.sigmas):
        name, noised = f"{sigma:g}", mixture(sigma)
        loss_key, grad_key = jax.random.split(jax.random.fold_in(key, i))
        metrics |= _entry(f"dsm_target_variance_{name}", _target(loss_key, noised, x, sigma))
        gradient = spread(grad_key, sigma, loss=_denoising)
        metrics |= _entry(f"dsm_gradient_variance_{name}", gradient)
        metrics |= _entry(f"dsm_error_{name}", error(_row(denoising, i)))
        metrics[f"dsm_bias_{name}"] = float(_rms(_exact(noised, x)[0] - truth))
    return metrics, figures.sigma(metrics, config.sigmas)


@jax.jit
def _target(key: ss.Key, noised: ss.GaussianMixture, x: Array, sigma: Array) -> Array:
    """‖target − exact score‖² [n]."""
    one = lambda key, x: ss.single_sigma_score_matching(key, noised.score, x, sigma=sigma)
    return 2 * jax.vmap(one)(jax.random.split(key, len(x)), x)


@partial(jax.jit, static_argnums=0, static_argnames="loss")
def _gradient_spread(
    net: ss.nets.MLP, params: ss.Params, x: Array, key: ss.Key, sigma: Array, *, loss: Callable
) -> Array:
    """‖g − E g‖² [n] for the gradient g of each example's loss by the parameters."""
    gradient = jax.grad(partial(loss, net))
    one = lambda key, x: ravel_pytree(gradient(params, key, (x[None], sigma)))[0]
    gradients = jax.vmap(one)(jax.random.split(key, len(x)), x)
    return jnp.sum((gradients - gradients.mean(0, keepdims=True)) ** 2, axis=1)


def _captions(config: Config, metrics: Metrics) -> dict[str, str]:
    """The main numbers of each figure, with a sentence each."""
    near, least, most = min(config.line_sigmas), min(config.sigmas), max(config.sigmas)
    best = min(config.sigmas, key=lambda sigma: metrics[f"dsm_error_{sigma:g}"])
    rows = {
        "line": [
            ("line_loss_0_early", "sliced score matching's loss on a line, early;"),
            ("line_loss_0", "late: it has no minimum."),
            (f"line_loss_{near:g}", f"With noise, sigma = {near:g}, it nears its minimum,"),
            (f"line_loss_exact_{near:g}", "which is known."),
        ],
        "low_density": [
            ("ssm_error_data", "mean error of a trained score on data;"),
            ("ssm_error_rare", "over the plane where less than 1 % of the data lie."),
        ],
        "weights": [
            row
            for name in SAMPLERS
            for row in (
                (f"weight_{name}", f"the weight by {name}, in truth {WEIGHT};"),
                (f"weight_{name}_z", "its z-score."),
            )
        ],
        "sigma": [
            ("ssm_error", "error of sliced score matching, which needs no sigma."),
            (f"dsm_error_{best:g}", f"Denoising at sigma = {best:g}, the best of them;"),
            (f"dsm_error_{least:g}", f"at sigma = {least:g}, the least,"),
            (f"dsm_error_{most:g}", f"and at sigma = {most:g}, the largest,"),
            (f"dsm_bias_{most:g}", "of which the exact score with noise has this much."),
        ],
    }
    stderr = lambda name: metrics.get(f"{name}_stderr")
    show = lambda name: f"{metrics[name]:.4g}" + (f" ± {stderr(name):.2g}" if stderr(name) else "")
    line = lambda name, sentence: f"{show(name):>22}  {sentence}"
    return {figure: "\n".join(line(*row) for row in lines) for figure, lines in rows.items()}


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
