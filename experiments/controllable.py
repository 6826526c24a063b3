"""Controllable generation: digits of a wanted class, completed and sharpened; photographs' patches
completed, coloured and deblurred, each by one score that was trained once.

Digits as in `experiments/digits.py`, by a network that knows their labels or not; the judge of
their class is a support vector machine that saw real training digits only. Patches are 32 × 32
ones of scikit-learn's photographs, reduced to 8 × 8. What is observed is of held-out images.
Writes classes.png, digits.png, patches.png, params.safetensors, metrics.json and config.json.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from sklearn.svm import SVC

import sde_score as ss
from experiments._controllable_figures import classes_figure, problems_figure
from experiments._run import (
    Metrics,
    as_dict,
    check_limits,
    check_numbers,
    cli,
    estimate,
    results_folder,
    write_json,
)
from experiments.digits import bounded, make_optimizer, smooth, to_levels, to_model
from sde_score import plots

SDE = ss.VP()
SAMPLED = ss.VP(t0=1e-3)  # below it the noise is less than the dequantisation's
NONE = 10  # the label that stands for none
DIGIT, PATCH = (8, 8, 1), (8, 8, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    width: int = 256  # of the digits' network
    patch_width: int = 384
    depth: int = 3
    smoothing: float = 0.01  # the share of the digits' pixels that become a random grey level
    label_dropout: float = 0.15  # the share of labels replaced by none
    digits_sigma: float = 0.55  # the data's standard deviations
    patches_sigma: float = 0.65
    digits_steps: int = 6000
    classifier_steps: int = 1500
    patches_steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    scale: float = 2.0  # of classifier-free guidance
    classifier_scale: float = 3.0
    num_per_class: int = 40
    num_digits: int = 297  # held-out ones to observe
    num_patches: int = 104
    num_draws: int = 8  # for each observation
    num_resamples: int = 5  # of inpainting and colourisation
    num_particles: int = 256  # of twisted sequential Monte Carlo, and its `sigma_data`
    particles_sigma: float = 0.8
    pgdm_sigma: float = 0.3  # of the digits for ΠGDM; keeps more classes than 0.2 and 0.55
    sample_steps: int = 60
    noise: float = 0.02  # of what is observed, on a range of 2
    seed: int = 0
    params: Path | None = None  # a params.safetensors to use instead of training
    out: Path = Path("runs/controllable")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed", "smoothing", "weight_decay"))
        limits = {"num_digits": (10, 297), "num_patches": (10, 104), "num_draws": (4, 1000)}
        check_limits(self, **limits)


QUICK = Config(
    patch_width=128,
    num_particles=16,
    digits_steps=300,
    classifier_steps=200,
    patches_steps=200,
    num_per_class=10,
    num_digits=20,
    num_patches=10,
    num_draws=4,
    num_resamples=2,
    sample_steps=30,
)


class Problem(NamedTuple):
    """`observe(key, x0)` gives y; `draw(key, score_fn, y)` draws [num_draws, *event] given y;
    `show(y)` is y as an image.
    """

    observe: Callable
    draw: Callable
    show: Callable


def main(config: Config) -> Metrics:
    """Train, control, judge; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        train_key, classes_key, *keys = jax.random.split(jax.random.key(config.seed), 5)
        keys.append(jax.random.fold_in(keys[0], 1))
        digits, patches = ss.data.digits(), _small_patches()
        params = _train(train_key, config, digits.train, patches.train)
        metrics = {"train_seconds": time.perf_counter() - start}
        judge = _judge(digits.train)
        levels, labels = (np.asarray(part[: config.num_digits]) for part in digits.test)
        x0, y0 = to_model(keys[0], levels), patches.test.images
        y0 = y0[np.linspace(0, len(y0) - 1, config.num_patches).astype(int)]
        metrics |= judge("judge", x0[:, None], labels)
        metrics |= _coarse_judge(keys[3], digits.train, x0, labels)
        classes = _classes(classes_key, config, params)
        for name, x in classes.items():  # the ten classes in turn
            metrics |= judge(name, x[:, None], np.arange(len(x)) % 10)
            metrics |= _energy_distance(name, x, x0)
        for name, key, real in (("digits", keys[1], x0), ("patches", keys[2], y0)):
            found = _control(key, config, name, params[name], real)
            for task, (seen, draws) in found.items():
                metrics |= _compare(task, seen, draws, real)
                if name == "digits":
                    metrics |= judge(task, draws, labels)
                    metrics |= judge(f"{task}_mean", draws.mean(axis=1, keepdims=True), labels)
            plots.save(problems_figure(found, real, metrics), folder / f"{name}.png")
        plots.save(classes_figure(classes, metrics), folder / "classes.png")
        metrics["total_seconds"] = time.perf_counter() - start
        ss.save_params(folder / "params.safetensors", params, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _small_patches() -> ss.data.Split:
    """8 × 8 patches, means of squares of 4 × 4 pixels, in [-1, 1]."""
    reduce = jax.vmap(ss.downsampling_operator((32, 32, 3), 4))
    parts = [p._replace(images=reduce(p.images / 127.5 - 1.0)) for p in ss.data.patches()]
    return ss.data.Split(*parts)


def _nets(config: Config) -> dict[str, nn.Module]:
    mlp = ss.nets.MLP(config.width, config.depth)
    return {
        "digits": ss.nets.Conditional(mlp, num_classes=NONE),
        "classifier": ss.nets.Classifier(NONE, config.width),
        "patches": ss.nets.MLP(config.patch_width, config.depth),
    }


def _score(config: Config, name: str, params: ss.Params) -> Partial:
    sigma_data = getattr(config, f"{name}_sigma")
    net_fn = Partial(_nets(config)[name].apply, params)
    return ss.score_from_preconditioned(SDE, net_fn, sigma_data=sigma_data)


def _losses(config: Config) -> dict[str, Callable]:
    """Of a batch of labelled images, for each network."""
    matching = {"weight": ss.likelihood_weight, "times": ss.likelihood_times}

    def as_data(key: ss.Key, images: Array) -> Array:
        smoothing_key, data_key = jax.random.split(key)
        return to_model(data_key, smooth(smoothing_key, images, config.smoothing))

    def digits(params: ss.Params, key: ss.Key, batch: ss.data.Examples) -> Array:
        data_key, label_key, loss_key = jax.random.split(key, 3)
        none = jax.random.bernoulli(label_key, config.label_dropout, batch.labels.shape)
        labels, x0 = jnp.where(none, NONE, batch.labels), as_data(data_key, batch.images)
        score_fn = _score(config, "digits", params)
        return ss.dsm_loss(loss_key, score_fn, SDE, x0, context=labels, **matching)

    def classifier(params: ss.Params, key: ss.Key, batch: ss.data.Examples) -> Array:
        data_key, loss_key = jax.random.split(key)
        logits_fn = Partial(_nets(config)["classifier"].apply, params)
        x0 = as_data(data_key, batch.images)
        return ss.classifier_loss(loss_key, logits_fn, SDE, x0, batch.labels)

    def patches(params: ss.Params, key: ss.Key, batch: ss.data.Examples) -> Array:
        flip_key, loss_key = jax.random.split(key)
        flip_keys = jax.random.split(flip_key, len(batch.images))
        x0 = jax.vmap(ss.data.random_flip)(flip_keys, batch.images)
        return ss.dsm_loss(loss_key, _score(config, "patches", params), SDE, x0, **matching)

    return {"digits": digits, "classifier": classifier, "patches": patches}


def _train(
    key: ss.Key, config: Config, digits: ss.data.Examples, patches: ss.data.Examples
) -> ss.Params:
    """The parameters of each network."""
    data, params = {"digits": digits, "classifier": digits, "patches": patches}, {}
    losses = _losses(config)
    for net_key, (name, net) in zip(jax.random.split(key, 3), _nets(config).items(), strict=True):
        init_key, batch_key, fit_key = jax.random.split(net_key, 3)
        num_steps = getattr(config, f"{name}_steps")
        context = (0,) if name == "digits" else ()
        like = jnp.zeros(data[name].images.shape[1:])
        params[name] = net.init(init_key, like, 0.0, *context)
        if config.params is not None:
            continue
        optimizer = make_optimizer(config.learning_rate, num_steps, config.weight_decay)
        batches = ss.data.batches(batch_key, data[name], config.batch_size)
        state, _ = ss.fit(
            fit_key, losses[name], params[name], optimizer, batches, num_steps=num_steps
        )
        params[name] = state.ema_params
    return params if config.params is None else ss.load_params(config.params, like=params)[0]


def _judge(train: ss.data.Examples) -> Callable[[str, Array, np.ndarray], Metrics]:
    """The accuracy of digits x [n, k, *event], whose k share a label, with its standard error
    over the n.
    """
    table = lambda levels: np.asarray(levels, np.float64).reshape(-1, math.prod(DIGIT))
    machine = SVC(C=10.0).fit(table(train.images), np.asarray(train.labels))

    def accuracy(name: str, x: Array, labels: np.ndarray) -> Metrics:
        right = machine.predict(table(to_levels(x))).reshape(x.shape[:2]) == labels[:, None]
        return estimate(f"{name}_accuracy", right.mean(axis=1))

    return accuracy


def _coarse_judge(key: ss.Key, train: ss.data.Examples, x0: Array, labels: np.ndarray) -> Metrics:
    """The accuracy of a machine that saw 4 × 4 digits: what super-resolution has to go by."""
    coarse = jax.vmap(ss.downsampling_operator(DIGIT, 2))
    table = lambda x: np.asarray(coarse(x)).reshape(len(x), -1)
    machine = SVC(C=10.0).fit(table(to_model(key, train.images)), np.asarray(train.labels))
    return estimate("coarse_judge_accuracy", machine.predict(table(x0)) == labels)


def _classes(key: ss.Key, config: Config, params: ss.Params) -> dict[str, Array]:
    """Samples of the classes in turn: by the conditional score itself, and guided in two ways."""
    score_fn = _score(config, "digits", params["digits"])
    logits_fn = Partial(_nets(config)["classifier"].apply, params["classifier"])
    ways = {
        "conditional": lambda s, k: ss.condition(s, k),
        "classifier_free": lambda s, k: ss.classifier_free(s, k, NONE, config.scale),
        "classifier_guided": lambda s, k: ss.classifier_guidance(
            ss.condition(s, NONE), logits_fn, k, scale=config.classifier_scale
        ),
    }
    labels, found = jnp.arange(config.num_per_class * 10) % 10, {}
    for way_key, (name, way) in zip(jax.random.split(key, 3), ways.items(), strict=True):
        draw = lambda key, s, label, way=way: _sample(key, config, bounded(way(s, label)), DIGIT)
        keys = jax.random.split(way_key, len(labels))
        found[name] = jax.jit(jax.vmap(draw, (0, None, 0)))(keys, score_fn, labels)
    return found


def _sample(key: ss.Key, config: Config, score_fn: Partial, shape: tuple, **options: Any) -> Array:
    options = {"step": ss.ancestral, "ts": ss.log_snr_grid(SAMPLED, config.sample_steps)} | options
    return ss.sample(key, score_fn, SAMPLED, shape, **options)


def _problems(config: Config) -> dict[str, dict[str, Problem]]:
    middle = np.abs(np.arange(8) - 3.5) < 2
    hole = np.broadcast_to((middle[:, None] & middle)[..., None], PATCH)
    upper = np.broadcast_to(np.arange(8)[:, None, None] < 4, DIGIT)
    coarse, blur = (
        ss.downsampling_operator(DIGIT, 2),
        ss.blur_operator(PATCH, jnp.full((3, 3), 1 / 9)),
    )
    colours = Problem(
        lambda key, x0: jnp.mean(x0, axis=-1),
        lambda key, s, y: _keeping(key, config, s, PATCH, ss.colourise, y),
        lambda y: jnp.repeat(y[..., None], 3, axis=-1),
    )
    digits = {
        "inpainting": _completion(config, upper),
        "super_resolution": _inverse(config, coarse, _particles),
        "super_resolution_pgdm": _inverse(config, coarse, partial(_pgdm, config.pgdm_sigma)),
    }
    patches = {
        "patch_inpainting": _completion(config, ~hole),
        "colourisation": colours,
        "deblurring": _inverse(config, blur, partial(_pgdm, config.patches_sigma)),
    }
    return {"digits": digits, "patches": patches}


def _completion(config: Config, mask: Any) -> Problem:
    """Of what `mask` hides."""
    return Problem(
        lambda key, x0: jnp.where(mask, x0, 0.0),
        lambda key, s, y: _keeping(key, config, s, mask.shape, ss.inpaint, y, mask),
        lambda y: y,
    )


def _keeping(
    key: ss.Key, config: Config, score_fn: Partial, shape: tuple, keep: Callable, *seen: Any
) -> Array:
    step = keep(ss.ancestral, *seen, num_resamples=config.num_resamples)
    options = {"step": step, "finish": ss.keep_observed(step)}
    draw = lambda key: _sample(key, config, score_fn, shape, **options)
    return jax.vmap(draw)(jax.random.split(key, config.num_draws))


def _inverse(config: Config, operator: ss.LinearOperator, method: Callable) -> Problem:
    """An image smaller than x0 is shown as large."""

    def observe(key: ss.Key, x0: Array) -> Array:
        y = operator(x0)
        return y + config.noise * jax.random.normal(key, y.shape)

    def show(y: Array) -> Array:
        factor = operator.like.shape[0] // y.shape[0]
        return y.repeat(factor, axis=0).repeat(factor, axis=1)

    return Problem(observe, lambda key, s, y: method(key, config, s, operator, y), show)


def _pgdm(
    sigma_data: float,
    key: ss.Key,
    config: Config,
    score_fn: Partial,
    operator: ss.LinearOperator,
    y: Array,
) -> Array:
    options = {"noise": config.noise, "sigma_data": sigma_data}
    guided = ss.pgdm(score_fn, SAMPLED, operator, y, **options)
    draw = lambda key: _sample(key, config, guided, operator.like.shape)
    return jax.vmap(draw)(jax.random.split(key, config.num_draws))


def _particles(
    key: ss.Key, config: Config, score_fn: Partial, operator: ss.LinearOperator, y: Array
) -> Array:
    """By twisted sequential Monte Carlo; draws from its weighted particles."""
    run_key, draw_key = jax.random.split(key)
    options = {"noise": config.noise, "sigma_data": config.particles_sigma}
    options |= {"ts": ss.log_snr_grid(SAMPLED, config.sample_steps)}
    options |= {"num_particles": config.num_particles}
    found = ss.twisted_smc(run_key, score_fn, SAMPLED, operator, y, **options)
    chosen = jax.random.categorical(draw_key, jnp.log(found.weights), shape=(config.num_draws,))
    return found.x[chosen]


def _control(
    key: ss.Key, config: Config, name: str, params: ss.Params, x0: Array
) -> dict[str, tuple[Array, Array]]:
    """For each problem, what is seen of each x0, and draws [n, num_draws, *event] given that."""
    score_fn, found = _score(config, name, params), {}
    score_fn = bounded(ss.condition(score_fn, NONE) if name == "digits" else score_fn)
    for i, (task, problem) in enumerate(_problems(config)[name].items()):
        found[task] = _solve(jax.random.fold_in(key, i), score_fn, problem, x0)
    return found


def _solve(key: ss.Key, score_fn: Partial, problem: Problem, x0: Array) -> tuple[Array, Array]:
    def one(key: ss.Key, score_fn: Partial, x0: Array) -> tuple[Array, Array]:
        noise_key, draw_key = jax.random.split(key)
        y = problem.observe(noise_key, x0)
        return problem.show(y), problem.draw(draw_key, score_fn, y)

    return jax.jit(jax.vmap(one, (0, None, 0)))(jax.random.split(key, len(x0)), score_fn, x0)


def _compare(name: str, seen: Array, draws: Array, x0: Array) -> Metrics:
    """PSNR of the draws, of their mean and of what is seen; how far completed images are, as a
    law, from real ones that were not observed.
    """

    return (
        estimate(f"{name}_psnr", _psnr(draws, x0[:, None]).mean(axis=1))
        | estimate(f"{name}_mean_psnr", _psnr(draws.mean(axis=1), x0))
        | estimate(f"{name}_seen_psnr", _psnr(seen, x0))
        | _energy_distance(name, draws[::2, 0], x0[1::2])
    )


def _psnr(x: Array, x0: Array) -> Array:
    """10 log10(2²/mean square error), in dB, of images on a range of 2."""
    error = jnp.mean((jnp.clip(x, -1.0, 1.0) - x0) ** 2, axis=(-3, -2, -1))
    return 10.0 * jnp.log10(4.0 / error)


def _energy_distance(name: str, x: Array, real: Array) -> Metrics:
    value, stderr = ss.metrics.energy_distance(x, real)
    name = f"{name}_energy_distance"
    return {name: float(value), f"{name}_stderr": float(stderr)}


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
