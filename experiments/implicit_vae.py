"""Variational auto-encoders with an implicit encoder: any sampler, trained through its score.

Three networks learn side by side: an encoder z = g(ε, x) whose density nobody knows, a decoder,
and the score of the encoder, by sliced score matching, which gives the gradient of its entropy.
Here g = m(ε₁, x) + s(x) ε₂. Beside it the ordinary VAE: the same layers without ε₁, of known
entropy. Both see the same batches for the same number of steps.

Digits: scikit-learn's 8×8, black where a pixel is at least 8 of 16, a Bernoulli decoder and a
latent normal prior. The held-out likelihood is by annealed importance sampling, which asks no
encoder. Plane: a mixture of two Gaussians, one coordinate observed with noise, so that the
posterior is a mixture of two too, in closed form.

Writes loss.png (−log p(x, z), which both have), digits.png (reconstructions, samples),
posterior.png (the aggregate posteriors), bimodal.png, metrics.json, config.json and
params.safetensors.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import sde_score as ss
from experiments._ais import ais_log_weights, log_mean_exp
from experiments._run import (
    Metrics,
    as_dict,
    check_numbers,
    cli,
    estimate,
    results_folder,
    write_json,
)
from experiments._vae import NAMES, Decoder, Encoder, Model, train_both
from experiments._vae_figures import aggregate, images, losses, plane
from sde_score import plots

PRIOR = ss.GaussianMixture(
    np.array([0.4, 0.6]), np.array([[-1.2, 0.3], [1.2, -0.3]]), np.stack([0.36 * np.eye(2)] * 2)
)
NOISE = 0.5  # of what is observed of the plane: its second coordinate


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    latent: int = 8
    width: int = 128
    num_seeds: int = 5
    num_steps: int = 3_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    score_steps: int = 3  # for each step of the encoder and the decoder
    score_learning_rate: float = 2e-3
    num_probes: int = 1
    weight_decay: float = 1e-2
    bimodal_width: int = 64
    bimodal_steps: int = 2_000
    num_test: int = 150
    num_chains: int = 10
    num_temperatures: int = 300
    num_samples: int = 2_000  # of each posterior on the plane
    seed: int = 0
    out: Path = Path("runs/implicit_vae")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed", "weight_decay"))
        if not (self.num_seeds >= 2 and 10 <= self.num_test <= 297 and self.num_chains >= 2):
            raise ValueError(
                "`num_seeds` and `num_chains` must be at least 2, `num_test` in 10 … 297; got "
                f"{self.num_seeds}, {self.num_chains}, {self.num_test}."
            )


QUICK = Config(
    num_seeds=2,
    num_steps=300,
    bimodal_steps=300,
    num_test=40,
    num_temperatures=100,
    num_samples=500,
)


def main(config: Config) -> Metrics:
    """Train both on either data, evaluate; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        keys = iter(jax.random.split(jax.random.key(config.seed), 8))
        train, test = ss.data.digits()
        binary = lambda images: jnp.asarray(images >= 8, jnp.float32)
        model = _digits_model(config)
        params, curves, metrics = train_both(next(keys), config, model, binary(train.images))
        held_out = binary(test.images[: config.num_test])
        ais_key = next(keys)
        log_probs = {}
        for name in NAMES:
            decoder = params[name]["decoder"]
            log_probs[name], costs = _ais(
                jax.random.clone(ais_key), config, decoder, held_out, name
            )
            metrics |= costs
        metrics |= _compare(log_probs)
        plots.save(losses(curves), folder / "loss.png")
        shown = {n: _reconstruct(next(keys), config, n, params[n], held_out) for n in NAMES}
        plots.save(images(held_out, shown), folder / "digits.png")
        codes = {n: _encode(config, n, params[n], next(keys), binary(test.images)) for n in NAMES}
        plots.save(aggregate(codes, test.labels), folder / "posterior.png")
        plane_metrics, plane_params, figure = _plane(next(keys), config)
        plots.save(figure, folder / "bimodal.png")
        metrics |= plane_metrics | {"total_seconds": time.perf_counter() - start}
        everything = {"digits": params, "plane": plane_params}
        ss.save_params(folder / "params.safetensors", everything, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _digits_model(config: Config) -> Model:
    decoder = Decoder(config.width, (8, 8, 1))
    log_joint = lambda params, z, x: bernoulli(decoder, params, z, x) - 0.5 * jnp.sum(z**2)
    return Model(log_joint, decoder, config.latent, config.width, config.num_steps)


def bernoulli(decoder: Decoder, params: ss.Params, z: Array, x: Array) -> Array:
    """log p(x | z) of a binary image, in nats."""
    return -jnp.sum(optax.sigmoid_binary_cross_entropy(decoder.apply(params, z), x))


def _ais(
    key: ss.Key, config: Config, decoder: ss.Params, x: Array, name: str
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
def _log_weights(config: Config, key: ss.Key, decoder: ss.Params, x: Array) -> Array:
    """[num_seeds, num_test, num_chains]; step sizes come from a first run on ten images."""
    pilot_key, run_key = jax.random.split(key)
    net, num = Decoder(config.width, (8, 8, 1)), config.num_temperatures
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


def _compare(log_probs: dict[str, np.ndarray]) -> Metrics:
    """Means over seeds and digits, with 95 % intervals over digits and the spread over seeds."""
    rows = log_probs | {"implicit_minus_gaussian": log_probs["implicit"] - log_probs["gaussian"]}
    metrics = {}
    for name, values in rows.items():
        digits, seeds = values.mean(0), values.mean(1)
        stderr = digits.std(ddof=1) / len(digits) ** 0.5
        low, high = ss.confidence_interval(digits.mean(), stderr, len(digits))
        metrics |= {f"{name}_log_prob": float(digits.mean()), f"{name}_log_prob_low": float(low)}
        metrics[f"{name}_log_prob_high"] = float(high)
        metrics[f"{name}_log_prob_seed_std"] = float(seeds.std(ddof=1))
    return metrics


def _first(params: ss.Params) -> ss.Params:
    return jax.tree.map(lambda leaf: leaf[0], params)


def _encode(config: Config, name: str, params: ss.Params, key: ss.Key, x: Array) -> Array:
    """One z for each x, by the first seed's encoder."""
    encoder = Encoder(config.width, name == "implicit")
    noise = jax.random.normal(key, (len(x), 2 * config.latent))
    return jax.vmap(lambda x, e: encoder.apply(_first(params)["encoder"], x, e)[0])(x, noise)


def _reconstruct(
    key: ss.Key, config: Config, name: str, params: ss.Params, x: Array
) -> tuple[Array, Array]:
    """Of the first 20 images, and 60 images from the prior."""
    encode_key, prior_key = jax.random.split(key)
    decoder = Decoder(config.width, (8, 8, 1))
    decode = lambda z: nn.sigmoid(decoder.apply(_first(params)["decoder"], z))
    codes = _encode(config, name, params, encode_key, x[:20])
    drawn = jax.random.normal(prior_key, (60, config.latent))
    return jax.vmap(decode)(codes), jax.vmap(decode)(drawn)


def _plane(key: ss.Key, config: Config) -> tuple[Metrics, dict[str, ss.Params], Any]:
    """The bimodal posterior: KL(q ‖ p) and the weight of a mode at five observations."""
    data_key, train_key, draw_key, exact_key = jax.random.split(key, 4)
    log_likelihood = lambda z, x: -0.5 * jnp.sum((x - z[1]) ** 2) / NOISE**2
    log_joint = lambda params, z, x: PRIOR.log_prob(z) + log_likelihood(z, x)
    model = Model(log_joint, None, 2, config.bimodal_width, config.bimodal_steps)
    z_key, noise_key = jax.random.split(data_key)
    z = jax.vmap(PRIOR.sample)(jax.random.split(z_key, 20_000))[:, 1:]
    x = z + NOISE * jax.random.normal(noise_key, z.shape)
    params, _, costs = train_both(train_key, config, model, x)
    observed = jnp.quantile(x, jnp.array([0.1, 0.3, 0.5, 0.7, 0.9]))[:, None]
    noise = jax.random.normal(draw_key, (config.num_samples, 4))
    draws = {}
    for name in NAMES:
        encoder = Encoder(model.width, name == "implicit")
        code = lambda p, x, e, encoder=encoder: encoder.apply(p["encoder"], x, e)[0]
        every = jax.vmap(
            jax.vmap(jax.vmap(code, (None, None, 0)), (None, 0, None)), (0, None, None)
        )
        draws[name] = jax.jit(every)(params[name], observed, noise)  # [seeds, 5, n, 2]
    posteriors = [PRIOR.posterior(lambda z: z[1:], x, NOISE) for x in observed]
    exact_keys = jax.random.split(exact_key, (len(posteriors), config.num_samples))
    truth = [jax.vmap(p.sample)(k) for p, k in zip(posteriors, exact_keys, strict=True)]
    metrics = {f"bimodal_{name}": value for name, value in costs.items() if "seconds" in name}
    kl = {name: _of_each(_kl, posteriors, z) for name, z in draws.items()}
    bias = _of_each(_kl, posteriors, jnp.stack(truth)[None])  # of the estimator, as q = p
    metrics["kl_bias"] = float(bias.mean())
    for name, z in draws.items():
        by_seed = (kl[name] - bias).mean(1)
        metrics |= estimate(f"{name}_kl", by_seed)
        metrics[f"{name}_weight_error"] = float(_of_each(_weight_error, posteriors, z).max())
    metrics["bimodal_weight_error"] = metrics.pop("implicit_weight_error")
    return metrics, params, plane(posteriors, draws)


def _of_each(fn: Callable, posteriors: list[ss.GaussianMixture], draws: Array) -> Array:
    """[num_seeds, observations] of fn(posterior, draws)."""
    return jnp.array([[fn(p, z) for p, z in zip(posteriors, row, strict=True)] for row in draws])


@jax.jit
def _kl(posterior: ss.GaussianMixture, z: Array) -> Array:
    """KL(q ‖ p) from draws of q, log q by a kernel density of one half at the other."""
    fitted, new = jnp.split(z, 2)
    few = fitted[:500]  # choosing the width reads all pairs often; it falls as n^(−1/6)
    width = ss.cross_validated_bandwidth(few) * (len(few) / len(fitted)) ** (1 / 6)
    log_q = ss.kernel_density_log_prob(fitted, width)
    return jnp.mean(jax.lax.map(lambda z: log_q(z) - posterior.log_prob(z), new, batch_size=100))


@jax.jit
def _weight_error(posterior: ss.GaussianMixture, z: Array) -> Array:
    """|E_q p(first mode | z) − its weight|; 0 where q = p."""
    share = jnp.mean(jax.vmap(posterior.responsibilities)(z)[:, 0])
    return jnp.abs(share - posterior.weights[0])


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
