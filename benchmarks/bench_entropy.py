"""Bias and variance of the entropy gradient, against a truth that needs no score.

z = y + A y + B sin(K y) with y of a fixed law in d dimensions, a residual layer at A = B = 0. By
Stein's identity ∂H/∂A = I and ∂H/∂B_ij = K_ji E cos(k_j·y), which is closed for a Gaussian and a
mixture of two, and a mean over a million draws for the push-forward of N(0, I) through a fixed
random flow of three affine couplings.

The score is exact; or learnt by sliced score matching on n samples, one network and one recipe for
all (three layers of 64 and a linear skip, decoupled weight decay on the layers, 1,000 steps); or
Stein's estimator of n samples, its width the median distance. The gradient is averaged over the
same n samples ("same": n draws are all that is used) or over n new ones ("fresh"). Errors are
Frobenius norms relative to the truth's, over repetitions of everything: `error` is the root mean
square, `bias` that of the mean (what noise puts into it subtracted), `std` the rest; of the whole
gradient, of its linear part A and of its waves B. `large` takes a score of n samples to
its limit: the gradient is averaged over 4,000 new ones.
"""

import argparse
import json
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import sde_score as ss
from benchmarks._measure import context
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
    return Law(draw, gmm.score, mean_cos)


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

    return Law(draw, jax.grad(log_prob), mean_cos)


def laws(dim):
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "gaussian": mixture(keys[0], dim, (1.0,)),
        "mixture": mixture(keys[1], dim, (0.4, 0.6)),
        "flow": flow(keys[2], dim),
    }


def gradient(score_fn, waves, y):
    """∇ of the mean surrogate with respect to (A, B) at 0, [d, d + m]."""

    def surrogate(theta):
        layer = lambda y: y + theta @ jnp.concatenate([y, jnp.sin(waves @ y)])
        return jnp.mean(jax.vmap(lambda y: ss.entropy_surrogate(score_fn, layer, y))(y))

    dim = y.shape[1]
    return jax.grad(surrogate)(jnp.zeros((dim, dim + len(waves))))


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
    return lambda y: NET.apply(params, (y - mean) / std) / std


def stein(key, y):
    return ss.stein_score(y)


def solve(target, law, dim, n, name, fit, num_repetitions):
    """One JSON line."""
    waves = jax.random.normal(jax.random.key(5), (dim, dim)) / dim**0.5
    truth = jnp.concatenate([jnp.eye(dim), waves.T * law.mean_cos(waves)[None]], axis=1)

    def repeat(key):
        data_key, fresh_key, large_key, fit_key = jax.random.split(key, 4)
        y = law.draw(data_key, n)
        score_fn = law.score if fit is None else fit(fit_key, y)
        out = [gradient(score_fn, waves, y)]
        if fit is not None:
            out.append(gradient(score_fn, waves, law.draw(fresh_key, n)))
            parts = law.draw(large_key, LARGE).reshape(4, -1, dim)
            large = jax.lax.map(partial(gradient, score_fn, waves), parts)
            out.append(large.mean(0))
        return jnp.stack(out)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), n), num_repetitions)
    run = jax.jit(lambda keys: jax.lax.map(repeat, keys)).lower(keys).compile()
    start = time.perf_counter()
    found = np.asarray(run(keys), np.float64)
    seconds = (time.perf_counter() - start) / num_repetitions
    line = context(f"entropy_{name}") | {"target": target, "dim": dim, "samples": n}
    line |= {"repetitions": num_repetitions, "seconds_each": round(seconds, 4)}
    for i, use in enumerate(("same", "fresh", "large")[: found.shape[1]]):
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
                solve(target, law, dim, n, "exact", None, 200)
                solve(target, law, dim, n, "sliced", sliced, options.repetitions)
                solve(target, law, dim, n, "stein", stein, options.repetitions)


if __name__ == "__main__":
    main()
