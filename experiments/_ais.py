"""Annealed importance sampling: the marginal likelihood of a decoder, log p(x) = log ∫ p(z)
p(x | z) dz, without any encoder.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import sde_score as ss
from experiments._run import Metrics
from experiments._vae import Decoder, bernoulli

TARGET = 0.57  # the acceptance at which MALA mixes best (Roberts & Rosenthal 1998)


def temperatures(num: int, *, delta: float = 4.0) -> Float[Array, " num+1"]:
    """0 = β_0 < … < β_num = 1, sigmoidal: dense near both ends (Wu et al. 2017, arXiv 1611.04273,
    sec. 2.3).
    """
    values = jax.nn.sigmoid(delta * jnp.linspace(-1.0, 1.0, num + 1))
    return (values - values[0]) / (values[-1] - values[0])


def ais_log_weights(
    key: ss.Key,
    log_likelihood: Callable[[Array], Array],
    dim: int,
    step_sizes: Float[Array, " num"],
    *,
    num_chains: int,
    num_moves: int = 2,
    adapt: float = 0.0,
) -> tuple[Float[Array, " chains"], Float[Array, " num"]]:
    """log w of each chain from z ~ N(0, I) through p(z) p(x | z)^β_i, E w = p(x) (Neal 2001, eq.
    11), and the step sizes used.

    `log_likelihood` is z: [dim] -> log p(x | z). Level i ends with `num_moves` of `mala_sample`
    with ε = step_sizes[i], which keeps E w exact. With `adapt` above 0, for a first run only, the
    ε of a level follows the acceptance of those before, from step_sizes[0] on. log mean w is, in
    the mean, below log p(x).
    """
    betas = temperatures(len(step_sizes))
    start_key, move_key = jax.random.split(key)

    def level(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        z, log_w, factor = carry
        i, low, high, size = inputs
        size = jnp.where(adapt > 0, step_sizes[0] * factor, size)
        log_w = log_w + (high - low) * jax.vmap(log_likelihood)(z)
        log_prob = lambda z: high * log_likelihood(z) - 0.5 * jnp.sum(z**2)
        keys = jax.random.split(jax.random.fold_in(move_key, i), num_chains)
        move = lambda key, z: ss.mala_sample(key, log_prob, z, step_size=size, num_steps=num_moves)
        chains = jax.vmap(move)(keys, z)
        factor = factor * jnp.exp(adapt * (chains.acceptance.mean() - TARGET))
        return (chains.x, log_w, factor), size

    z = jax.random.normal(start_key, (num_chains, dim))
    carry = z, jnp.zeros(num_chains), jnp.ones(())
    levels = jnp.arange(len(step_sizes)), betas[:-1], betas[1:], step_sizes
    (_, log_w, _), sizes = jax.lax.scan(level, carry, levels)
    return log_w, sizes


def log_mean_exp(log_w: Float[Array, "*batch chains"]) -> Float[Array, "*batch"]:
    return jax.nn.logsumexp(log_w, axis=-1) - jnp.log(log_w.shape[-1])


def marginal_likelihood(
    key: ss.Key, config: Any, decoder: ss.Params, x: Array, name: str
) -> tuple[np.ndarray, Metrics]:
    """log p(x) of every seed and image, [num_seeds, num_test]; the cost, and what twice the chains
    gained.
    """
    start = time.perf_counter()
    log_w = _log_weights(config, key, decoder, x)
    value = np.asarray(log_mean_exp(log_w), np.float64)
    metrics = {f"{name}_ais_seconds": time.perf_counter() - start}
    half = np.asarray(log_mean_exp(log_w[..., : config.num_chains // 2]), np.float64)
    return value, metrics | {f"{name}_ais_gain": float((value - half).mean())}


@partial(jax.jit, static_argnums=0)
def _log_weights(config: Any, key: ss.Key, decoder: ss.Params, x: Array) -> Array:
    """[num_seeds, num_test, num_chains]; step sizes come from a first run on ten images."""
    pilot_key, run_key = jax.random.split(key)
    net, num = Decoder(config.width, x.shape[1:]), config.num_temperatures
    options = {"dim": config.latent, "num_chains": config.num_chains}

    def run(params: ss.Params, sizes: Array, adapt: float, key: ss.Key, x: Array) -> tuple:
        likelihood = lambda z: bernoulli(net, params, z, x)
        return ais_log_weights(key, likelihood, step_sizes=sizes, adapt=adapt, **options)

    def of_seed(params: ss.Params) -> Array:
        keys = jax.random.split(pilot_key, 10)
        _, sizes = jax.vmap(partial(run, params, jnp.ones(num), 20 / num))(keys, x[:10])
        sizes = jnp.exp(jnp.log(sizes).mean(0))
        keys = jax.random.split(run_key, len(x))
        return jax.vmap(partial(run, params, sizes, 0.0))(keys, x)[0]

    return jax.vmap(of_seed)(decoder)


def two_way_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and its 95 % interval for other seeds and other digits, values: [seeds, digits].

    The variances of the mean over either add up, what is neither's alone counted in both;
    Student's quantile has Satterthwaite's degrees of freedom.
    """
    means = values.mean(1), values.mean(0)
    parts = np.array([m.var(ddof=1) / len(m) for m in means])
    freedom = parts.sum() ** 2 / np.sum(parts**2 / np.array([len(m) - 1 for m in means]))
    ends = ss.confidence_interval(values.mean(), parts.sum() ** 0.5, int(freedom) + 1)
    return float(values.mean()), *map(float, ends)
