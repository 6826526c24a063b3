"""Score matching over an SDE: objectives on one example at one time, the laws of that time, and
losses of a batch.

A loss is an estimate of E_t E_{x_t} [weight(t) · objective], t uniform on [t0, t1], whatever law
draws the times: each `Times` returns with its draws the weights 1/((t1 − t0) density) that keep
the expectation the same.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn
from sde_score.divergence import rademacher_probes
from sde_score.losses.score_matching import implicit_score_matching, sliced_score_matching
from sde_score.sde import log_snr, perturb, time_of_log_snr

Weight: TypeAlias = Callable[[SDE, Scalar], Scalar]
Times: TypeAlias = Callable[[Key, SDE, int], tuple[Array, Array]]


def noise_weight(sde: SDE, t: Scalar) -> Scalar:
    """sigma(t)²: each noise level weighs the same in units of the noise (Song et al. 2021, sec.
    3.3).
    """
    return sde.sigma(t) ** 2


def likelihood_weight(sde: SDE, t: Scalar) -> Scalar:
    """g(t)²: the loss bounds the negative log-likelihood (Song et al. 2021, arXiv 2101.09258, thm
    1).
    """
    return sde.diffusion(t) ** 2


def uniform_times(
    key: Key, sde: SDE, num: int
) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
    """Independent times, uniform on [t0, t1]; their weights are 1."""
    _check_draw(key, num)
    t = sde.t0 + (sde.t1 - sde.t0) * jax.random.uniform(key, (num,))
    return t, jnp.ones(num)


def stratified_times(
    key: Key, sde: SDE, num: int
) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
    """One time in each of `num` equal parts of [t0, t1]: uniform on the whole, with less variance
    in a batch's loss.
    """
    return sde.t0 + (sde.t1 - sde.t0) * _stratified(key, num), jnp.ones(num)


def likelihood_times(
    key: Key, sde: SDE, num: int
) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
    """Times with density ∝ g²/sigma² (Song et al. 2021, arXiv 2101.09258, sec. 5.1), stratified.

    As g²/sigma² = −d log_snr/dt for every linear SDE, they are uniform in log-SNR.
    """
    highest, lowest = (log_snr(sde, jnp.asarray(t)) for t in (sde.t0, sde.t1))
    t = time_of_log_snr(sde, lowest + (highest - lowest) * _stratified(key, num))
    slope = (jax.vmap(sde.diffusion)(t) / jax.vmap(sde.sigma)(t)) ** 2
    return t, (highest - lowest) / (slope * (sde.t1 - sde.t0))


def _stratified(key: Key, num: int) -> Float[Array, " num"]:
    _check_draw(key, num)
    return (jnp.arange(num) + jax.random.uniform(key, (num,))) / num


def _check_draw(key: Key, num: int) -> None:
    _checks.check_key(key)
    _checks.check_count("num", num)


def denoising_score_matching(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "*event"],
    t: Scalar,
    *,
    weight: Weight = noise_weight,
) -> Scalar:
    """weight(t) · ½‖s(x_t, t) − ∇ log p(x_t | x_0)‖² for one draw of x_t (Vincent 2011; Song et
    al. 2021, eq. 7).

    With x_t = alpha x_0 + sigma z the target is −z/sigma, so the residual is (sigma s + z)/sigma:
    no division before the subtraction.
    """
    x_t, noise = perturb(key, sde, x0, t)
    sigma = sde.sigma(t)
    residual = sigma * _checks.call(score_fn, x_t, t) + noise
    return 0.5 * _weigh(weight, sde, t) / sigma**2 * jnp.sum(residual**2)


def dsm_loss(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "B *event"],
    *,
    context: Any = None,
    weight: Weight = noise_weight,
    times: Times = uniform_times,
) -> Scalar:
    """Denoising score matching of a batch: the mean of `denoising_score_matching` over examples
    and times.

    `context`, any pytree whose leaves have the batch axis (labels, dropout keys), is mapped along
    with x0: the score is then called as score_fn(x, t, context_i). `weight(sde, t)` is any
    function, `noise_weight` by default.
    """

    def objective(key: Key, score_fn: ScoreFn, x0: Array, t: Scalar) -> Scalar:
        return denoising_score_matching(key, score_fn, sde, x0, t, weight=weight)

    return _batch_loss(key, objective, score_fn, sde, x0, context, times)


def ism_loss(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "B *event"],
    *,
    context: Any = None,
    weight: Weight = noise_weight,
    times: Times = uniform_times,
) -> Scalar:
    """Implicit score matching of a batch at noised points: `dsm_loss` less a constant, at d
    Jacobian products.
    """

    def objective(key: Key, score_fn: ScoreFn, x0: Array, t: Scalar) -> Scalar:
        x_t, _ = perturb(key, sde, x0, t)
        return _weigh(weight, sde, t) * implicit_score_matching(lambda x: score_fn(x, t), x_t)

    return _batch_loss(key, objective, score_fn, sde, x0, context, times)


def ssm_loss(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "B *event"],
    *,
    context: Any = None,
    weight: Weight = noise_weight,
    times: Times = uniform_times,
    num_projections: int = 1,
    variance_reduced: bool = True,
    probes: Callable = rademacher_probes,
) -> Scalar:
    """Sliced score matching of a batch at noised points: `ism_loss` with its trace estimated by
    projections.

    `probes(key, num, shape)` draws them: `rademacher_probes` or `gaussian_probes`.
    """

    _checks.check_count("num_projections", num_projections)

    def objective(key: Key, score_fn: ScoreFn, x0: Array, t: Scalar) -> Scalar:
        noise_key, probe_key = jax.random.split(key)
        x_t, _ = perturb(noise_key, sde, x0, t)
        directions = probes(probe_key, num_projections, x0.shape)
        return _weigh(weight, sde, t) * sliced_score_matching(
            lambda x: score_fn(x, t), x_t, directions, variance_reduced=variance_reduced
        )

    return _batch_loss(key, objective, score_fn, sde, x0, context, times)


def _weigh(weight: Weight, sde: SDE, t: Scalar) -> Scalar:
    return _checks.check_scalar("weight", weight(sde, t), "(sde, t)")


def _batch_loss(
    key: Key,
    objective: Callable,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Array,
    context: Any,
    times: Times,
) -> Scalar:
    """The weighted mean of objective(key, score_fn, x0, t) over a batch, one time and one key for
    each example.
    """
    _checks.check_key(key)
    _checks.check_data("x0", x0)
    _checks.check_sde(sde)
    x0 = _checks.at_least_float32(x0)
    if x0.ndim == 0:
        raise _checks.ArgumentError(
            "`x0` must be a batch of examples; got shape (). Give x0 of shape (B, *event)."
        )
    for leaf in jax.tree.leaves(context):
        _checks.check_shape(
            "context", jnp.shape(leaf)[:1], x0.shape[:1], "Each leaf needs the batch axis of `x0`."
        )
    time_key, example_key = jax.random.split(key)
    t, importance = times(time_key, sde, x0.shape[0])

    def one(key: Key, x0: Array, t: Scalar, context: Any) -> Scalar:
        conditioned = score_fn if context is None else lambda x, t: score_fn(x, t, context)
        return objective(key, conditioned, x0, t)

    keys = jax.random.split(example_key, x0.shape[0])
    return jnp.mean(importance * jax.vmap(one)(keys, x0, t.astype(x0.dtype), context))
