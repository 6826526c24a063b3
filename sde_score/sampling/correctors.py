"""Correctors, `Step`s that stay at t, and their combination with a predictor (Song et al. 2021,
arXiv 2011.13456, alg. 1).

A corrector moves `num_steps` times by x ← x + η s(x, t) + √(2η) z, with η = 2a (snr ρ)² and a =
(alpha_t/alpha_s)²: the published 1 − beta_i (1 for VE).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, Step, bind

Event = Float[Array, "*event"]

_CORRECTOR = 2_718_281_828  # folded into the key: the predictor takes the key itself


def predictor_corrector(predictor: Step, corrector: Step) -> Partial:
    """The `Step` that corrects x_t at t, then predicts x_s from it: the published code's order
    (the paper's algorithm enters the same loop at the predictor).

    A corrector that does nothing leaves the predictor's x_s as it is, bit for bit. The predictor
    is not to be another such pair: both correctors would draw the same noise.
    """
    return bind(_predictor_corrector, predictor, corrector)


def langevin(snr: Scalar, *, num_steps: int = 1) -> Partial:
    """The corrector with ρ = sigma(t), so that η depends on no sample: the published annealed
    Langevin corrector (`ald` in the code), for every linear SDE.

    Unadjusted: where p_t is Gaussian of variance λ, the stationary variance is λ/(1 − η/(2λ)), at
    most 1/(1 − a snr²) times too large. Published snr, for `batch_langevin`: 0.16 (CIFAR-10),
    0.17 (CelebA), 0.075 (256 px), 0.15 (1024 px).
    """
    return bind(_correct, _noise_level, _repeated(snr, num_steps))


def batch_langevin(snr: Scalar, *, num_steps: int = 1) -> Partial:
    """The corrector with ρ = mean ‖z‖ / mean ‖s‖ over a batch (Song et al. 2021, alg. 4 and 5,
    with their code's means): about sigma(t), but a sample depends on its neighbours.

    The batch, [B, *event], is the event: pass `jax.vmap(score_fn, (0, None))`. The stationary law
    of a small batch is wrong (∝ p_t ‖s‖² for one example): prefer `langevin`.
    """
    return bind(_correct, _norm_ratio, _repeated(snr, num_steps))


def _repeated(snr: Scalar, num_steps: int) -> Array:
    """[num_steps], whose shape keeps the count static in a pytree."""
    _checks.check_positive_number("snr", snr)
    _checks.check_count("num_steps", num_steps)
    return jnp.full(num_steps, snr)


def _predictor_corrector(
    predictor: Step,
    corrector: Step,
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x_t: Event,
    t: Scalar,
    s: Scalar,
) -> Event:
    corrected = corrector(jax.random.fold_in(key, _CORRECTOR), score_fn, sde, x_t, t, s)
    return predictor(key, score_fn, sde, corrected, t, s)


def _correct(
    radius: Callable,
    snrs: Float[Array, " num_steps"],
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x_t: Event,
    t: Scalar,
    s: Scalar,
) -> Event:
    a = (sde.alpha(t) / sde.alpha(s)) ** 2

    def move(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        index, snr = inputs
        noise = jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
        score = _checks.call(score_fn, x, t)
        size = jnp.asarray(2.0 * a * (snr * radius(sde, t, noise, score)) ** 2, x.dtype)
        return x + size * score + jnp.sqrt(2.0 * size) * noise, None

    return jax.lax.scan(move, x_t, (jnp.arange(snrs.size), snrs))[0]


def _noise_level(sde: SDE, t: Scalar, noise: Array, score: Array) -> Scalar:
    return sde.sigma(t)


def _norm_ratio(sde: SDE, t: Scalar, noise: Array, score: Array) -> Scalar:
    if noise.ndim < 2:
        raise _checks.ArgumentError(
            f"`batch_langevin` takes a batch, x of shape [B, *event]; got {noise.shape}. For one "
            "example use `langevin`."
        )
    noise_norm, score_norm = (
        jnp.mean(jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1)) for x in (noise, score)
    )
    return noise_norm / score_norm
