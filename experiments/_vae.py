"""The networks of `implicit_vae` and their training, all seeds in one program."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import sde_score as ss
from experiments._run import Metrics

NAMES = ("gaussian", "implicit")


class Encoder(nn.Module):
    """(x, ε: [2d]) -> (z, log s), z = m + s(x) ε₂ with ε = (ε₁, ε₂); m is a function of x and,
    where `implicit`, of ε₁.

    Where a z of d dimensions from d of noise folds, its score is infinite; ε₂ smooths.
    """

    width: int
    implicit: bool

    @nn.compact
    def __call__(self, x: Array, noise: Array) -> tuple[Array, Array]:
        first, last = jnp.split(noise, 2)
        x = x.reshape(-1)
        log_std = bounded(nn.Dense(last.size)(nn.swish(nn.Dense(self.width)(x))))
        h = jnp.concatenate([x, first]) if self.implicit else x
        for _ in range(2):
            h = nn.swish(nn.Dense(self.width)(h))
        return nn.Dense(last.size)(h) + jnp.exp(log_std) * last, log_std


def bounded(log_std: Array) -> Array:
    """Within ±4: an exponential must not run away early in training."""
    return 4.0 * jnp.tanh(log_std / 4.0)


class Decoder(nn.Module):
    """z -> the logits of an image."""

    width: int
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for _ in range(2):
            z = nn.swish(nn.Dense(self.width)(z))
        return nn.Dense(int(np.prod(self.shape)))(z).reshape(self.shape)


class PosteriorScore(nn.Module):
    """(z, x) -> ∇ log q(z | x): a normal's of learnt mean and scale, and a correction in its
    units.
    """

    width: int

    @nn.compact
    def __call__(self, z: Array, x: Array) -> Array:
        h = nn.swish(nn.Dense(self.width)(x.reshape(-1)))
        mean, log_std = jnp.split(nn.Dense(2 * z.size)(h), 2)
        log_std = bounded(log_std)
        u = (z - mean) * jnp.exp(-log_std)
        h = jnp.concatenate([u, h])
        for _ in range(2):
            h = nn.swish(nn.Dense(self.width)(h))
        bend = nn.Dense(z.size, kernel_init=nn.initializers.zeros)(h)
        return (bend - u) * jnp.exp(-log_std)


class Model(NamedTuple):
    """What is learnt from: log p(x, z), given the decoder's parameters, and its sizes."""

    log_joint: Callable[[ss.Params, Array, Array], Array]
    decoder: nn.Module | None
    dim: int
    width: int
    num_steps: int


def train_both(
    key: ss.Key, config: Any, model: Model, x: Array
) -> tuple[dict[str, ss.Params], dict[str, np.ndarray], Metrics]:
    """Parameters with a leading axis of seeds, losses [num_seeds, num_steps], costs and noise."""
    params, curves, metrics = {}, {}, {}
    keys = jax.random.split(key, config.num_seeds)
    for name in NAMES:
        run = jax.jit(jax.vmap(partial(_train, config, model, name), (0, None)))
        run = run.lower(keys, x).compile()
        start = time.perf_counter()
        params[name], rows = jax.block_until_ready(run(keys, x))
        metrics[f"{name}_train_seconds"] = time.perf_counter() - start
        curves[name] = np.asarray(rows["loss"])
        if not np.isfinite(curves[name]).all():
            raise FloatingPointError(f"The {name} VAE diverged. Lower the learning rates.")
        tail = curves[name][:, -max(10, model.num_steps // 10) :]
        metrics[f"{name}_loss"] = float(tail.mean())
        metrics[f"{name}_loss_spread"] = float(tail.mean(1).std(ddof=1))  # over seeds
        metrics[f"{name}_loss_noise"] = float(tail.std(1, ddof=1).mean())  # over steps
        norms = np.asarray(rows["grad_norm"])[:, -tail.shape[1] :]
        metrics[f"{name}_grad_norm"] = float(np.sqrt(np.mean(norms**2)))
    return params, curves, metrics


def _train(
    config: Any, model: Model, name: str, key: ss.Key, x: Array
) -> tuple[ss.Params, dict[str, Array]]:
    """One network of each kind; the loss of each step is E −log p(x, z), whatever the encoder."""
    init_key, batch_key, fit_key = jax.random.split(key, 3)
    encoder, score = Encoder(model.width, name == "implicit"), PosteriorScore(model.width)
    latent = jnp.zeros(model.dim)
    keys = jax.random.split(init_key, 3)
    init = {"encoder": encoder.init(keys[0], x[0], jnp.zeros(2 * model.dim)), "decoder": {}}
    if model.decoder is not None:
        init["decoder"] = model.decoder.init(keys[1], latent)
    score_init = score.init(keys[2], latent, x[0])
    draw = lambda key, batch: jax.random.normal(key, (len(batch), 2 * model.dim))

    def model_loss(params: ss.Params, score_params: ss.Params, key: ss.Key, batch: Array) -> Array:
        def one(noise: Array, x: Array) -> tuple[Array, Array]:
            sampler = lambda noise: encoder.apply(params["encoder"], x, noise)[0]
            z, log_std = encoder.apply(params["encoder"], x, noise)
            learnt = lambda z: score.apply(score_params, z, x)
            entropy = ss.entropy_surrogate(learnt, sampler, noise)
            entropy = entropy if name == "implicit" else jnp.sum(log_std)
            return -model.log_joint(params["decoder"], z, x), entropy

        energy, entropy = jax.tree.map(jnp.mean, jax.vmap(one)(draw(key, batch), batch))
        return energy - entropy + jax.lax.stop_gradient(entropy)

    def score_loss(score_params: ss.Params, params: ss.Params, key: ss.Key, batch: Array) -> Array:
        def one(noise: Array, probes: Array, x: Array) -> Array:
            z, _ = encoder.apply(params["encoder"], x, noise)
            return ss.sliced_score_matching(lambda z: score.apply(score_params, z, x), z, probes)

        noise_key, probe_key = jax.random.split(key)
        shape = len(batch), config.num_probes, model.dim
        probes = jax.random.rademacher(probe_key, shape, jnp.float32)
        return jnp.mean(jax.vmap(one)(draw(noise_key, batch), probes, batch))

    def optimizer(rate: float, num_steps: int, last: float, weight_decay: float) -> Any:
        schedule = optax.cosine_decay_schedule(rate, num_steps, alpha=last)
        adam = optax.adamw(schedule, b1=0.5, weight_decay=weight_decay)  # as Song et al. (2019)
        return optax.chain(optax.clip_by_global_norm(10.0), adam)

    # the score goes on learning to the end: an encoder that leaves a frozen one behind diverges
    optimizers = (
        optimizer(config.learning_rate, model.num_steps, 0.0, config.weight_decay),
        optimizer(config.score_learning_rate, config.score_steps * model.num_steps, 0.1, 0.0),
    )
    batches = ss.data.batches(batch_key, x, min(config.batch_size, len(x)))
    if name == "implicit":
        step = ss.make_alternating_step(
            model_loss, score_loss, *optimizers, score_steps=config.score_steps
        )
        state = ss.AlternatingState(
            ss.init_train_state(init, optimizers[0]),
            ss.init_train_state(score_init, optimizers[1]),
        )
    else:
        alone = lambda params, key, batch: model_loss(params, score_init, key, batch)
        step = ss.make_train_step(alone, optimizers[0])
        state = ss.init_train_state(init, optimizers[0])

    def advance(state: Any, i: Array) -> tuple[Any, dict[str, Array]]:
        state, metrics = step(state, jax.random.fold_in(fit_key, i), batches(i))
        return state, {n: metrics.get(n, metrics.get(f"model_{n}")) for n in ("loss", "grad_norm")}

    state, rows = jax.lax.scan(advance, state, jnp.arange(model.num_steps))
    last = state.model if name == "implicit" else state
    return last.params, rows
