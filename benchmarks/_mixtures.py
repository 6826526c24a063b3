"""Gaussian mixtures, and how far samples are from them.

Errors are the sliced Wasserstein-2 distance to as many exact draws (`sw2`), over 128 fixed
directions and a root mean square over 32 sets of such draws; the energy distance to one of these
sets; and the errors of the mean and the covariance, root mean squares in units of the coordinates'
standard deviations.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sde_score as ss

DIRECTIONS, SETS = 128, 32
MIXTURES = Path(__file__).with_name("mixtures.json")


class Truth(NamedTuple):
    """What samples are compared with."""

    directions: np.ndarray  # [DIRECTIONS, d]
    draws: np.ndarray  # [DIRECTIONS, n]: exact draws along them, in order
    quantiles: np.ndarray  # [DIRECTIONS, n]: the mean of SETS such draws
    spread: float  # their variance about it
    mean: np.ndarray
    covariance: np.ndarray


def load_mixture(name):
    fields = json.loads(MIXTURES.read_text())[name]
    return ss.GaussianMixture(**{key: np.array(value) for key, value in fields.items()})


def make_mixture(dim, seed=0):
    """Two components of random orientation whose variances span 0.01 to 0.5."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(2, dim, dim)))[0]
    variances = np.geomspace(0.01, 0.5, dim)
    covariances = np.einsum("kij,j,klj->kil", axes, variances, axes)
    return ss.GaussianMixture(np.array([0.6, 0.4]), 0.6 * rng.normal(size=(2, dim)), covariances)


@partial(jax.jit, static_argnames="shape")
def exact_draws(key, gmm, shape):
    """[*shape, d]: as gmm.sample, but without a matrix for each point."""
    component_key, noise_key = jax.random.split(key)
    num, (values, vectors) = math.prod(shape), gmm.spectrum
    component = jax.random.categorical(component_key, jnp.log(gmm.weights), shape=(num,))
    noise = jnp.sqrt(values)[None] * jax.random.normal(noise_key, (num, 1, gmm.dim))
    of_each = gmm.means[None] + jnp.einsum("kij,nkj->nki", vectors, noise)
    draws = jnp.take_along_axis(of_each, component[:, None, None], axis=1)
    return jnp.reshape(draws, (*shape, gmm.dim))


def make_truth(key, gmm, points, seed=0):
    directions = np.random.default_rng(seed).normal(size=(DIRECTIONS, gmm.dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    keys = jax.random.split(key, SETS)
    sets = (np.asarray(exact_draws(key, gmm, (points,))) for key in keys)
    draws = np.stack([project(directions, x) for x in sets])
    spread = float(np.mean(np.var(draws, axis=0)))
    return Truth(
        directions,
        draws[0],
        draws.mean(0),
        spread,
        np.asarray(gmm.mean),
        np.asarray(gmm.covariance),
    )


def errors(truth, sets):
    """Of the samples x [n, d] in `sets`: the mean of the energy distance, root mean squares of
    the others.
    """
    found = [_errors(truth, np.asarray(x)) for x in sets]
    mean = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    return {name: v if name == "energy_distance" else v**0.5 for name, v in mean.items()}


def distance_of_a_pair(truth, x, y):
    """The sliced Wasserstein-2 distance of two samples [n, d] to each other."""
    x, y = (project(truth.directions, np.asarray(points)) for points in (x, y))
    return float(np.sqrt(np.mean((x - y) ** 2)))


def _errors(truth, x):
    """Squared ones, but for the energy distance."""
    projections = project(truth.directions, x)
    some = slice(None, None, 4)  # a quarter of the directions is enough here
    distance = energy_distance(projections[some], truth.draws[some], x.shape[1])
    scale = np.sqrt(np.diag(truth.covariance))
    mean = (x.mean(axis=0) - truth.mean) / scale
    covariance = (np.cov(x.T) - truth.covariance) / np.outer(scale, scale)
    return {
        "sw2": np.mean((projections - truth.quantiles) ** 2) + truth.spread,
        "energy_distance": distance,
        "mean_error": np.mean(mean**2),
        "covariance_error": np.mean(covariance**2),
    }


def project(directions, x):
    """x [n, d] along each direction, in order: [k, n]."""
    return np.sort(directions.astype(np.float32) @ x.astype(np.float32).T, axis=1)


def energy_distance(x, y, dim):
    """`ss.metrics.energy_distance` from ordered projections [k, n] and [k, m]: the mean of |θᵀv|
    over the sphere is ‖v‖ Γ(d/2)/(√π Γ((d + 1)/2)), and an ordered sample sums its differences.
    """
    n, m = x.shape[1], y.shape[1]
    xx, yy, zz = (
        _sum_of_differences(z) for z in (x, y, np.sort(np.concatenate([x, y], axis=1), axis=1))
    )
    sliced = np.mean((zz - xx - yy) / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1)))
    log_ratio = math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)
    return sliced * math.sqrt(math.pi) * math.exp(log_ratio)


def _sum_of_differences(x):
    """Σ_{i,j} |x_i − x_j| of each ordered row."""
    n = x.shape[1]
    return 2.0 * (x @ (2.0 * np.arange(n) - n + 1.0))
