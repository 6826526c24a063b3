"""Variational auto-encoders with an implicit encoder: any sampler, trained through its score.

Three networks learn side by side: an encoder z = g(ε, x) whose density nobody knows, a decoder,
and the score of the encoder, by sliced score matching, which gives the gradient of its entropy.
Here g = m(ε₁, x) + s(x) ε₂. Beside it the ordinary VAE: the same layers without ε₁, a diagonal
Gaussian of known entropy, twice: for as many steps, on the same batches, and for
`gaussian_step_factor` times as many ("gaussian_longer"), about as long as the implicit one takes:
`cost_ratio` measures it, the factor is whole and given so that a run can be repeated.

Digits: scikit-learn's 8×8, or MNIST where it has been prepared, white where a pixel is at least
half of the range, a Bernoulli decoder and a latent normal prior. The held-out likelihood is by
annealed importance sampling, which asks no encoder; its intervals are over seeds and digits.
Which gradient is noisier says `gradient_noise`, over the encoder's noise at fixed parameters.
Plane: a mixture of two Gaussians, one coordinate observed with noise, so that the posterior is a
mixture of two too, in closed form. The density of the implicit encoder is a quadrature over ε₁.

Writes loss.png (−log p(x, z), which all have, and the likelihoods), digits.png (reconstructions,
samples), posterior.png (the aggregate posteriors), bimodal.png, metrics.json, config.json and
params.safetensors.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import sde_score as ss
from experiments._ais import marginal_likelihood, two_way_interval
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
from experiments._vae import (
    Decoder,
    Encoder,
    Model,
    bernoulli,
    encoder_log_prob,
    gradient_noise,
    train_all,
)
from experiments._vae_figures import aggregate, images, losses, plane
from sde_score import plots
from sde_score.data import tfds

PRIOR = ss.GaussianMixture(
    np.array([0.4, 0.6]), np.array([[-1.2, 0.3], [1.2, -0.3]]), np.stack([0.36 * np.eye(2)] * 2)
)
NOISE = 0.5  # of what is observed of the plane: its second coordinate


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Literal["digits", "mnist"] = "digits"
    data_dir: Path | None = None
    latent: int = 8
    width: int = 128
    num_seeds: int = 5
    num_steps: int = 3_000
    gaussian_step_factor: int = 3  # of the Gaussian encoder trained longer
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
        most = 297 if self.data == "digits" else 10_000
        limits = {"num_test": (10, most), "num_samples": (100, 1_000_000)}
        check_limits(self, **limits, num_seeds=(2, 100), num_chains=(2, 10_000))
        if self.data == "mnist" and self.data_dir is None:
            raise ValueError("`data_dir` must be given for mnist. Add --data-dir DIR.")


QUICK = Config(
    num_seeds=2,
    num_steps=300,
    bimodal_steps=800,
    num_test=40,
    num_temperatures=100,
    num_samples=500,
)


def main(config: Config) -> Metrics:
    """Train all on either data, evaluate; returns the metrics that it writes."""
    start = time.perf_counter()
    with results_folder(config.out, config) as folder:
        train_key, ais_key, noise_key, show_key, code_key, plane_key = jax.random.split(
            jax.random.key(config.seed), 6
        )
        x, held_out, labels = _data(config)
        model = _image_model(config, x.shape[1:])
        steps = dict.fromkeys(("gaussian", "implicit"), config.num_steps)
        steps["gaussian_longer"] = config.gaussian_step_factor * config.num_steps
        params, curves, metrics = train_all(train_key, config, model, steps, x)
        ratio = metrics["implicit_train_seconds"] / metrics["gaussian_train_seconds"]
        metrics["cost_ratio"] = ratio
        few, log_probs, shown, codes = held_out[: config.num_test], {}, {}, {}
        for i, (name, each) in enumerate(params.items()):
            key = jax.random.fold_in(noise_key, i)
            if name in ("gaussian", "implicit"):
                metrics |= gradient_noise(key, model, name, each, x[: config.batch_size])
            decoder, key = each["decoder"], jax.random.clone(ais_key)  # common random numbers
            log_probs[name], costs = marginal_likelihood(key, config, decoder, few, name)
            metrics |= costs
            shown[name] = _reconstruct(jax.random.fold_in(show_key, i), config, name, each, few)
            codes[name] = _encode(config, name, each, jax.random.fold_in(code_key, i), held_out)
        metrics |= _compare(log_probs)
        plots.save(losses(curves, metrics), folder / "loss.png")
        plots.save(images(few, shown), folder / "digits.png")
        plots.save(aggregate(codes, labels), folder / "posterior.png")
        plane_metrics, plane_params, figure = _plane(plane_key, config)
        plots.save(figure, folder / "bimodal.png")
        metrics |= plane_metrics | {"total_seconds": time.perf_counter() - start}
        everything = {"digits": params, "plane": plane_params}
        ss.save_params(folder / "params.safetensors", everything, as_dict(config))
        write_json(folder / "metrics.json", metrics)
    return metrics


def _data(config: Config) -> tuple[Array, Array, Array]:
    """Binary images to learn from, and 300 others (more if asked for) with their labels."""
    if config.data == "digits":
        train, test, half = *ss.data.digits(), 8
    else:
        load = partial(tfds.load, "mnist", data_dir=config.data_dir)
        train, test, half = load(split="train"), load(split="test"), 128
    num = max(300, config.num_test)
    binary = lambda images: jnp.asarray(images >= half, jnp.float32)
    return binary(train.images), binary(test.images[:num]), test.labels[:num]


def _image_model(config: Config, shape: tuple[int, ...]) -> Model:
    decoder = Decoder(config.width, shape)
    log_joint = lambda params, z, x: bernoulli(decoder, params, z, x) - 0.5 * jnp.sum(z**2)
    return Model(log_joint, decoder, config.latent, config.width)


def _compare(log_probs: dict[str, np.ndarray]) -> Metrics:
    """Means over seeds and digits with 95 % intervals over both, and the spread over seeds."""
    rows = dict(log_probs)
    for name in ("gaussian", "gaussian_longer"):
        rows[f"implicit_minus_{name}"] = log_probs["implicit"] - log_probs[name]
    metrics = {}
    for name, values in rows.items():
        mean, low, high = two_way_interval(values)
        metrics |= {f"{name}_log_prob": mean, f"{name}_log_prob_low": low}
        metrics[f"{name}_log_prob_high"] = high
        metrics[f"{name}_log_prob_seed_std"] = float(values.mean(1).std(ddof=1))
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
    decoder = Decoder(config.width, x.shape[1:])
    decode = lambda z: nn.sigmoid(decoder.apply(_first(params)["decoder"], z))
    codes = _encode(config, name, params, encode_key, x[:20])
    drawn = jax.random.normal(prior_key, (60, config.latent))
    return jax.vmap(decode)(codes), jax.vmap(decode)(drawn)


def _plane(key: ss.Key, config: Config) -> tuple[Metrics, dict[str, ss.Params], Any]:
    """The bimodal posterior at five observations: KL(q ‖ p), and whether both modes are there."""
    data_key, train_key, draw_key, exact_key = jax.random.split(key, 4)
    log_likelihood = lambda z, x: -0.5 * jnp.sum((x - z[1]) ** 2) / NOISE**2
    log_joint = lambda params, z, x: PRIOR.log_prob(z) + log_likelihood(z, x)
    model = Model(log_joint, None, 2, config.bimodal_width)
    z_key, noise_key = jax.random.split(data_key)
    z = jax.vmap(PRIOR.sample)(jax.random.split(z_key, 20_000))[:, 1:]
    x = z + NOISE * jax.random.normal(noise_key, z.shape)
    steps = dict.fromkeys(("gaussian", "implicit"), config.bimodal_steps)
    params, _, costs = train_all(train_key, config, model, steps, x)
    metrics = {f"bimodal_{name}": value for name, value in costs.items() if "seconds" in name}
    observed = jnp.quantile(x, jnp.array([0.1, 0.3, 0.5, 0.7, 0.9]))[:, None]
    posteriors = [PRIOR.posterior(lambda z: z[1:], x, NOISE) for x in observed]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *posteriors)
    exact_keys = jax.random.split(exact_key, (len(observed), 50_000))
    truth = jax.jit(jax.vmap(lambda p, keys: _between(p, jax.vmap(p.sample)(keys))))
    between, draws = truth(stacked, exact_keys), {}
    for i, name in enumerate(steps):
        judge = partial(_judge, Encoder(model.width, name == "implicit"), config.num_samples)
        every = jax.vmap(jax.vmap(judge, (None, 0, 0, 0)), (0, None, None, 0))  # seeds × observed
        keys = jax.random.split(jax.random.fold_in(draw_key, i), (config.num_seeds, len(observed)))
        kl, share, mass, draws[name] = jax.jit(every)(params[name], stacked, observed, keys)
        # draws of each seed are its own: the spread over seeds has the error of Monte Carlo in it
        metrics |= estimate(f"{name}_kl", kl.mean(1))
        which = "bimodal" if name == "implicit" else name
        weight = stacked.weights[None, :, 0]
        metrics[f"{which}_weight_error"] = float(jnp.abs(share - weight).max())
        metrics[f"{which}_between_error"] = float(jnp.abs(mass - between[None]).max())
    return metrics, params, plane(posteriors, draws)


def _judge(
    encoder: Encoder,
    num: int,
    params: ss.Params,
    posterior: ss.GaussianMixture,
    x: Array,
    key: ss.Key,
) -> tuple[Array, Array, Array, Array]:
    """KL(q ‖ p), the weight of the first mode, the mass between the modes, and the draws of q."""
    noise = jax.random.normal(key, (num, 4))
    z = jax.vmap(lambda e: encoder.apply(params["encoder"], x, e)[0])(noise)
    log_q = encoder_log_prob(encoder, params, x, z)
    kl = jnp.mean(log_q - jax.vmap(posterior.log_prob)(z))
    share = jnp.mean(jax.vmap(posterior.responsibilities)(z)[:, 0])
    return kl, share, _between(posterior, z), z


def _between(posterior: ss.GaussianMixture, z: Array) -> Array:
    """The share of draws that neither mode explains: both responsibilities are above 0.1. One
    Gaussian over both modes has the right weights, but too much here.
    """
    return jnp.mean(jnp.min(jax.vmap(posterior.responsibilities)(z), axis=1) > 0.1)


if __name__ == "__main__":
    cli(main, default=Config(), quick=QUICK)
