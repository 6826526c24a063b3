"""The networks of `implicit_vae` and their training, all seeds in one program."""

import logging
import math
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
from experiments._run import Metrics, estimate


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


def bernoulli(decoder: Decoder, params: ss.Params, z: Array, x: Array) -> Array:
    """log p(x | z) of a binary image, in nats."""
    return -jnp.sum(optax.sigmoid_binary_cross_entropy(decoder.apply(params, z), x))


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


def train_all(
    key: ss.Key, config: Any, model: Model, num_steps: dict[str, int], x: Array
) -> tuple[dict[str, ss.Params], dict[str, np.ndarray], Metrics]:
    """Parameters with a leading axis of seeds, losses [num_seeds, num_steps] and costs of each
    name; "implicit" is implicit, every other Gaussian.
    """
    params, curves, metrics = {}, {}, {}
    for name, steps in num_steps.items():
        init_keys, keys = jax.random.split(jax.random.clone(key), (2, config.num_seeds))
        # not in the compiled function, which takes longer to compile than this to run
        inits = [_init(init_key, model, name, x[0]) for init_key in init_keys]
        init = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inits)
        run = jax.jit(jax.vmap(partial(_train, config, model, name, steps), (0, 0, None)))
        run = run.lower(keys, init, x).compile()
        start = time.perf_counter()
        logging.disable(logging.ERROR)  # the runtime reports at length what is raised below
        try:
            params[name], rows = jax.block_until_ready(run(keys, init, x))
        except jax.errors.JaxRuntimeError as error:
            if "must be finite" not in str(error):
                raise
            rows = np.full((1, 1), np.nan)
        finally:
            logging.disable(logging.NOTSET)
        metrics[f"{name}_train_seconds"] = time.perf_counter() - start
        curves[name] = np.asarray(rows)
        if not np.isfinite(curves[name]).all():
            raise FloatingPointError(f"The {name} VAE diverged. Lower the learning rates.")
        tail = curves[name][:, -max(10, steps // 10) :].mean(1)
        metrics |= estimate(f"{name}_loss", tail)  # over seeds
    return params, curves, metrics


def gradient_noise(
    key: ss.Key, model: Model, name: str, params: ss.Params, batch: Array, num: int = 100
) -> Metrics:
    """The standard deviation of the gradient over `num` draws of the encoder's noise, relative to
    the norm of its mean, at the last parameters of each seed on one batch.
    """
    model_loss, _ = _losses(model, name, num_probes=1)

    def of_seed(key: ss.Key, params: ss.Params) -> Array:
        learnt, score_params = _split(params)

        def add(total: ss.Params, i: Array) -> tuple[ss.Params, Array]:
            noise_key = jax.random.fold_in(key, i)
            grads = jax.grad(model_loss)(learnt, score_params, noise_key, batch)
            return jax.tree.map(jnp.add, total, grads), optax.tree.norm(grads) ** 2

        zero = jax.tree.map(jnp.zeros_like, learnt)
        total, squares = jax.lax.scan(add, zero, jnp.arange(num))
        square = optax.tree.norm(total) ** 2 / num**2
        variance = (squares.mean() - square) * num / (num - 1)
        return jnp.sqrt(variance / (square - variance / num))  # the mean has noise too

    keys = jax.random.split(key, len(jax.tree.leaves(params)[0]))
    return estimate(f"{name}_gradient_noise", jax.jit(jax.vmap(of_seed))(keys, params))


def encoder_log_prob(
    encoder: Encoder, params: ss.Params, x: Array, z: Array, *, num: int = 61
) -> Array:
    """log q(z | x) for z: [n, 2], q = E_ε₁ N(m(ε₁, x), s(x)²), by the trapezoidal rule on num²
    points ε₁ in [−5, 5]²; exact where m is of x alone.
    """
    line = jnp.linspace(-5.0, 5.0, num) if encoder.implicit else jnp.zeros(1)
    first = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
    log_weights = jax.nn.log_softmax(-0.5 * jnp.sum(first**2, axis=1))
    nodes = jnp.concatenate([first, jnp.zeros_like(first)], axis=1)
    means, log_std = jax.vmap(lambda e: encoder.apply(params["encoder"], x, e))(nodes)

    def one(z: Array) -> Array:
        u = (z[None] - means) * jnp.exp(-log_std)
        parts = -0.5 * jnp.sum(u**2, axis=1) - jnp.sum(log_std, axis=1) - math.log(2 * math.pi)
        return jax.nn.logsumexp(log_weights + parts)

    return jax.lax.map(one, z, batch_size=100)


def _split(params: ss.Params) -> tuple[ss.Params, ss.Params | None]:
    """The encoder and decoder, and the score if there is one."""
    return {name: params[name] for name in ("encoder", "decoder")}, params.get("score")


def _losses(model: Model, name: str, num_probes: int) -> tuple[Callable, Callable]:
    """Of the model and of its score; the model's value is E −log p(x, z), whatever the encoder."""
    encoder, score = Encoder(model.width, name == "implicit"), PosteriorScore(model.width)
    draw = lambda key, batch: jax.random.normal(key, (len(batch), 2 * model.dim))

    def model_loss(params: ss.Params, score_params: Any, key: ss.Key, batch: Array) -> Array:
        def one(noise: Array, x: Array) -> tuple[Array, Array]:
            sampler = lambda noise: encoder.apply(params["encoder"], x, noise)[0]
            z, log_std = encoder.apply(params["encoder"], x, noise)
            energy = -model.log_joint(params["decoder"], z, x)
            if name != "implicit":
                return energy, jnp.sum(log_std)
            learnt = lambda z: score.apply(score_params, z, x)
            return energy, ss.entropy_surrogate(learnt, sampler, noise)

        energy, entropy = jax.tree.map(jnp.mean, jax.vmap(one)(draw(key, batch), batch))
        return energy - entropy + jax.lax.stop_gradient(entropy)

    def score_loss(score_params: ss.Params, params: ss.Params, key: ss.Key, batch: Array) -> Array:
        def one(noise: Array, probes: Array, x: Array) -> Array:
            z, _ = encoder.apply(params["encoder"], x, noise)
            return ss.sliced_score_matching(lambda z: score.apply(score_params, z, x), z, probes)

        noise_key, probe_key = jax.random.split(key)
        shape = len(batch), num_probes, model.dim
        probes = jax.random.rademacher(probe_key, shape, jnp.float32)
        return jnp.mean(jax.vmap(one)(draw(noise_key, batch), probes, batch))

    return model_loss, score_loss


def _init(key: ss.Key, model: Model, name: str, x: Array) -> ss.Params:
    latent, keys = jnp.zeros(model.dim), jax.random.split(key, 3)
    encoder = Encoder(model.width, name == "implicit")
    init = {"encoder": encoder.init(keys[0], x, jnp.zeros(2 * model.dim)), "decoder": {}}
    if model.decoder is not None:
        init["decoder"] = model.decoder.init(keys[1], latent)
    if name == "implicit":
        init["score"] = PosteriorScore(model.width).init(keys[2], latent, x)
    return init


def _optimizer(rate: float, num_steps: int, last: float, weight_decay: float) -> Any:
    schedule = optax.cosine_decay_schedule(rate, num_steps, alpha=last)
    adam = optax.adamw(schedule, b1=0.5, weight_decay=weight_decay)  # as Song et al. (2019)
    return optax.chain(optax.clip_by_global_norm(10.0), adam)


def _train(
    config: Any,
    model: Model,
    name: str,
    num_steps: int,
    key: ss.Key,
    params: ss.Params,
    x: Array,
) -> tuple[ss.Params, Array]:
    """One network of each kind and the loss of each step."""
    batch_key, fit_key = jax.random.split(key)
    init, score_init = _split(params)
    model_loss, score_loss = _losses(model, name, config.num_probes)
    # the score goes on learning to the end: an encoder that leaves a frozen one behind diverges
    optimizers = (
        _optimizer(config.learning_rate, num_steps, 0.0, config.weight_decay),
        _optimizer(config.score_learning_rate, config.score_steps * num_steps, 0.1, 0.0),
    )
    batches = ss.data.batches(batch_key, x, min(config.batch_size, len(x)))
    state = ss.init_train_state(init, optimizers[0])
    if name == "implicit":
        step = ss.make_alternating_step(
            model_loss, score_loss, *optimizers, score_steps=config.score_steps
        )
        state = ss.AlternatingState(state, ss.init_train_state(score_init, optimizers[1]))
    else:
        alone = lambda params, key, batch: model_loss(params, None, key, batch)
        step = ss.make_train_step(alone, optimizers[0])

    def advance(state: Any, i: Array) -> tuple[Any, Array]:
        state, metrics = step(state, jax.random.fold_in(fit_key, i), batches(i))
        return state, metrics.get("loss", metrics.get("model_loss"))

    state, rows = jax.lax.scan(advance, state, jnp.arange(num_steps))
    if name == "implicit":
        return state.model.params | {"score": state.score.params}, rows
    return state.params, rows
