"""Bias and variance of the entropy gradient, against a truth that needs no score.

z = y + A y + B sin(K y) with y of a fixed law in d dimensions, a residual layer at A = B = 0. By
Stein's identity ∂H/∂A = I and ∂H/∂B_ij = K_ji E cos(k_j·y), which is closed for a Gaussian and a
mixture of two, and a mean over a million draws for the push-forward of N(0, I) through a fixed
random flow of three affine couplings.

The score is exact; that of a fitted Gaussian ("normal"); learnt by sliced score matching on n
samples, one network and one recipe for all (three layers of 64 and a linear skip, decoupled weight
decay on the layers, 1,000 steps); or Stein's estimator of n samples, its width the median
distance. The gradient is averaged over

    same    the same n samples, with Stein's scores of the points themselves: n draws in all,
    fresh   n new ones, whose Monte-Carlo error alone is that of the exact score,
    large   4,000 new ones: what is left is about the score's own error.

`same` does not tell a good score from a bad one. Where E_n, the mean over the samples, of the loss
½‖s‖² + div s is stationary in a linear map W added to the score, E_n[s yᵀ] = −I, and Stein's
estimator solves the same identity for its kernel: the truth's linear part, from any law and any
samples. So `normal`, wrong for a mixture and for the flow, has an error of 0 in it. `fresh` and
`large` measure the score, the waves best: a linear layer asks no more than the covariance.

Errors are Frobenius norms relative to the truth's, over repetitions of everything: `error` is the
root mean square, `bias` that of the mean (what noise puts into it subtracted), `std` the rest; of
the whole gradient, of its linear part A and of its waves B. `fit_s` and `gradient_s` are seconds
of the fit and of one gradient of n samples, apart, compiled.
"""

import argparse
import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import sde_score as ss
from benchmarks._measure import context, measure
from experiments.score_vs_kde import SkipMLP

STEPS, BATCH, RATE, DECAY, PROBES = 1_000, 256, 5e-3, 1.0, 1
LARGE, MANY = 4_000, 1_000_000
NET = SkipMLP(64)


class Law(NamedTuple):
    """How to draw, the exact score, and E cos(k·y) for the rows of K."""

    draw: object
    score: object
    mean_cos: object


def mixture(key, dim, weights):
    """Components of random orientation with variances 0.2 to 1, means 2 apart."""
    num = len(weights)
    axes = jnp.linalg.qr(jax.random.normal(key, (num, dim, dim)))[0]
    values = jnp.geomspace(0.2, 1.0, dim)
    covariances = jnp.einsum("kij,j,klj->kil", axes, values, axes)
    means = (jnp.arange(num) - 0.5 * (num - 1))[:, None] * jnp.full((1, dim), 2.0 / dim**0.5)
    gmm = ss.GaussianMixture(jnp.array(weights), means, covariances)

    def mean_cos(waves):
        variance = jnp.einsum("md,kde,me->mk", waves, covariances, waves)
        return jnp.sum(
            gmm.weights[None] * jnp.exp(-0.5 * variance) * jnp.cos(waves @ means.T), axis=1
        )

    draw = lambda key, n: jax.vmap(gmm.sample)(jax.random.split(key, n))
    return Law(draw, Partial(lambda y: gmm.score(y)), mean_cos)


def flow(key, dim):
    """Three couplings y_b = x_b exp(½ tanh(W x_a)) + tanh(V x_a), the halves taking turns."""
    half = dim // 2
    weights = jax.random.normal(key, (3, 2, half, half)) / half**0.5

    def forward(x):
        for w, v in weights:
            a, b = x[:half], x[half:]
            x = jnp.concatenate([b * jnp.exp(0.5 * jnp.tanh(w @ a)) + jnp.tanh(v @ a), a])
        return x

    def log_prob(y):
        log_det = 0.0
        for w, v in weights[::-1]:
            b, a = y[:half], y[half:]
            scale = 0.5 * jnp.tanh(w @ a)
            y = jnp.concatenate([a, (b - jnp.tanh(v @ a)) * jnp.exp(-scale)])
            log_det += jnp.sum(scale)
        return -0.5 * jnp.sum(y**2) - log_det

    draw = lambda key, n: jax.vmap(forward)(jax.random.normal(key, (n, dim)))

    def mean_cos(waves):
        part = lambda key: jnp.mean(jnp.cos(draw(key, MANY // 50) @ waves.T), axis=0)
        return jnp.mean(jax.lax.map(part, jax.random.split(jax.random.key(99), 50)), axis=0)

    return Law(draw, Partial(jax.grad(log_prob)), mean_cos)


def laws(dim):
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "gaussian": mixture(keys[0], dim, (1.0,)),
        "mixture": mixture(keys[1], dim, (0.4, 0.6)),
        "flow": flow(keys[2], dim),
    }


@jax.jit
def gradient(score_fn, waves, y):
    """∇ of the mean surrogate with respect to (A, B) at 0, [d, d + m]."""
    return of_scores(jax.vmap(score_fn)(y), waves, y)


@jax.jit
def of_scores(scores, waves, y):
    """The same, given the score of each of the samples."""

    def surrogate(theta):
        layer = lambda y: y + theta @ jnp.concatenate([y, jnp.sin(waves @ y)])
        one = lambda score, y: ss.entropy_surrogate(lambda _: score, layer, y)
        return jnp.mean(jax.vmap(one)(scores, y))

    dim = y.shape[1]
    return jax.grad(surrogate)(jnp.zeros((dim, dim + len(waves))))


@jax.jit
def normal(key, y):
    mean, precision = y.mean(0), jnp.linalg.inv(jnp.cov(y.T, ddof=0))
    return Partial(lambda mean, precision, y: -precision @ (y - mean), mean, precision)


@jax.jit
def sliced(key, y):
    """The score by sliced score matching on the n samples y, standardised."""
    mean, std = y.mean(0), y.std(0)
    init_key, batch_key, fit_key = jax.random.split(key, 3)

    def loss(params, key, batch):
        probes = jax.random.rademacher(key, (len(batch), PROBES, y.shape[1]), y.dtype)
        one = partial(ss.sliced_score_matching, Partial(NET.apply, params))
        return jnp.mean(jax.vmap(one)(batch, probes))

    decayed = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" in str(path) and "skip" not in str(path), params
    )
    schedule = optax.cosine_decay_schedule(RATE, STEPS)
    optimizer = optax.adamw(schedule, weight_decay=DECAY, mask=decayed)
    step = ss.make_train_step(loss, optimizer)
    batches = ss.data.batches(batch_key, (y - mean) / std, min(BATCH, len(y)))
    advance = lambda s, i: (step(s, jax.random.fold_in(fit_key, i), batches(i))[0], None)
    state = ss.init_train_state(NET.init(init_key, mean), optimizer)
    params = jax.lax.scan(advance, state, jnp.arange(STEPS))[0].params
    score_fn = lambda params, mean, std, y: NET.apply(params, (y - mean) / std) / std
    return Partial(score_fn, params, mean, std)


@jax.jit
def stein(key, y):
    return ss.stein_score(y)


FITS = {"normal": normal, "sliced": sliced, "stein": stein}


def same_gradient(name, score_fn, waves, y):
    """Of the samples that the score was fitted to; Stein's estimator has its own score of each."""
    if name == "stein":
        return of_scores(score_fn.args[-1], waves, y)
    return gradient(score_fn, waves, y)


def solve(target, law, dim, n, name, num_repetitions):
    """One JSON line."""
    waves = jax.random.normal(jax.random.key(5), (dim, dim)) / dim**0.5
    truth = jnp.concatenate([jnp.eye(dim), waves.T * law.mean_cos(waves)[None]], axis=1)
    draw = jax.jit(law.draw, static_argnums=1)
    fit = FITS.get(name, lambda key, y: law.score)

    def repeat(key):
        data_key, fresh_key, large_key, fit_key = jax.random.split(key, 4)
        y = draw(data_key, n)
        score_fn = fit(fit_key, y)
        parts = draw(large_key, LARGE).reshape(4, -1, dim)
        large = sum(gradient(score_fn, waves, part) for part in parts) / len(parts)
        fresh = gradient(score_fn, waves, draw(fresh_key, n))
        return np.stack([same_gradient(name, score_fn, waves, y), fresh, large])

    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), n), num_repetitions)
    found = np.array([repeat(key) for key in keys], np.float64)
    y, key = draw(jax.random.key(1), n), jax.random.key(2)
    score_fn = fit(key, y)
    functions = {"fit": lambda: fit(key, y), "gradient": lambda: gradient(score_fn, waves, y)}
    timed = measure(functions, repetitions=3)
    line = context(f"entropy_{name}") | {"target": target, "dim": dim, "samples": n}
    line |= {"repetitions": num_repetitions}
    line |= {f"{name}_s": round(timing.median_s, 5) for name, timing in timed.items()}
    for i, use in enumerate(("same", "fresh", "large")):
        line |= {f"{key}_{use}": value for key, value in errors(found[:, i], truth, dim).items()}
    print(json.dumps(line), flush=True)
    return line


def errors(found, truth, dim):
    """Relative to the truth's norm; `z` the mean's largest deviation in standard errors."""
    truth, num = np.asarray(truth, np.float64), len(found)
    square = lambda x: np.sum(x**2, axis=(-2, -1))
    rms = lambda part: np.sqrt(
        np.mean(square((found - truth)[..., part])) / square(truth[:, part])
    )
    variance = square(found.std(0, ddof=1))
    bias = max(0.0, square(found.mean(0) - truth) - variance / num)
    values = {
        "error": rms(slice(None)),
        "error_linear": rms(slice(dim)),
        "error_waves": rms(slice(dim, None)),
    }
    values |= {"bias": np.sqrt(bias / square(truth)), "std": np.sqrt(variance / square(truth))}
    stderr = found.std(0, ddof=1) / num**0.5
    values["z"] = np.max(np.abs(found.mean(0) - truth) / stderr)
    return {key: round(float(value), 4) for key, value in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=(2, 16))
    parser.add_argument("--samples", type=int, nargs="+", default=(300, 1_000))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--targets", nargs="+", default=("gaussian", "mixture", "flow"))
    options = parser.parse_args()
    for dim in options.dims:
        for target, law in laws(dim).items():
            if target not in options.targets:
                continue
            for n in options.samples:
                for name in ("exact", "normal", "sliced", "stein"):
                    num = 200 if name in ("exact", "normal") else options.repetitions
                    solve(target, law, dim, n, name, num)


if __name__ == "__main__":
    main()
