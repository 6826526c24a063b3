"""Score matching over an SDE: denoising score matching of one example at one time, and losses of a
batch that differ in one word.

Each loss estimates E_t E_{x_t} [weight(t) · objective] (see `losses.times`). From one key all of
them draw the same times and noise, so that differences between them are paired.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn
from sde_score.divergence import Probes, check_law, rademacher_probes
from sde_score.losses.score_matching import (
    explicit_score_matching,
    finite_difference_score_matching,
    implicit_score_matching,
    sliced_score_matching,
)
from sde_score.losses.times import Times, Weight, lognormal_times, noise_weight, uniform_times
from sde_score.parameterization import input_scaling
from sde_score.sde import perturb

_OBJECTIVE = 0x5C0_4E5  # folded into an example's key for what is not its noise
_EDM_TIMES = lognormal_times()


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
    """Denoising score matching of a batch: E weight(t) ½‖s(x_t, t) − ∇ log p(x_t | x_0)‖², the
    mean of `denoising_score_matching` over examples and times (Song et al. 2021, eq. 7).

    `context`, any pytree whose leaves have the batch axis (labels, dropout keys), is mapped along
    with x0: the score is then called as score_fn(x, t, context_i). `weight(sde, t)` is any
    function, `noise_weight` by default.
    """

    def objective(key: Key, score_fn: ScoreFn, x0: Array, t: Scalar) -> Scalar:
        return denoising_score_matching(key, score_fn, sde, x0, t, weight=weight)

    return _batch_loss(key, objective, score_fn, sde, x0, context, times)


def edm_loss(
    key: Key,
    net_fn: Callable,
    sde: SDE,
    x0: Float[Array, "B *event"],
    *,
    sigma_data: Scalar,
    context: Any = None,
    times: Times = _EDM_TIMES,
) -> Scalar:
    """EDM's loss E[λ ‖D(x_t, t) − x_0‖²] for D = precondition(sde, net_fn, sigma_data=sd), where
    λ = (s² + sd²)/(s sd)², s = sigma/alpha (Karras et al. 2022, arXiv 2206.00364, eq. 8, table 1).
    The expectation is under the law of `times`, uncorrected.

    As λ c_out² = 1, it is computed as ‖F(c_in x_t, c_noise) − c_in (sigma/sd x_0 − alpha sd z)‖².
    """
    _checks.check_positive_number("sigma_data", sigma_data)

    def objective(key: Key, net_fn: Callable, x0: Array, t: Scalar) -> Scalar:
        x_t, noise = perturb(key, sde, x0, t)
        c_in, c_noise = input_scaling(sde, sigma_data, t)
        target = c_in * (sde.sigma(t) / sigma_data * x0 - sde.alpha(t) * sigma_data * noise)
        return jnp.sum((_checks.call(net_fn, c_in * x_t, c_noise, name="net_fn") - target) ** 2)

    def unweighted(key: Key, sde: SDE, num: int) -> tuple[Array, Array]:
        return times(key, sde, num)[0], jnp.ones(num)

    return _batch_loss(key, objective, net_fn, sde, x0, context, unweighted)


def esm_loss(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "B *event"],
    *,
    true_score: ScoreFn,
    context: Any = None,
    weight: Weight = noise_weight,
    times: Times = uniform_times,
) -> Scalar:
    """Explicit score matching of a batch at noised points, E weight(t) ½‖s − ∇ log p_t‖² against
    the true score(x, t) where it is known: `dsm_loss` less `loss_floor` (Vincent 2011, sec. 4).
    """

    def objective(key: Key, score_fn: ScoreFn, x_t: Array, t: Scalar) -> Scalar:
        return explicit_score_matching(score_fn, lambda x: true_score(x, t), x_t)

    return _noised_loss(key, objective, score_fn, sde, x0, context, weight, times)


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
    """Implicit score matching of a batch at noised points, E weight(t) [tr(∂s/∂x) + ½‖s‖²]: the
    expectation of `dsm_loss` less a constant, at d Jacobian products (Hyvärinen 2005, thm 1).
    """

    def objective(key: Key, score_fn: ScoreFn, x_t: Array, t: Scalar) -> Scalar:
        return implicit_score_matching(score_fn, x_t)

    return _noised_loss(key, objective, score_fn, sde, x0, context, weight, times)


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
    probes: Probes = rademacher_probes,
) -> Scalar:
    """Sliced score matching of a batch at noised points, E weight(t) [vᵀ (∂s/∂x) v + ½‖s‖²]:
    `ism_loss` with its trace estimated by projections (Song et al. 2019, sec. 3).

    `probes(key, num, shape)` draws them: `rademacher_probes`, `gaussian_probes` or
    `sphere_probes`.
    """
    _check_projections(x0, num_projections, probes)

    def objective(key: Key, score_fn: ScoreFn, x_t: Array, t: Scalar) -> Scalar:
        directions = probes(key, num_projections, x_t.shape)
        return sliced_score_matching(score_fn, x_t, directions, variance_reduced=variance_reduced)

    return _noised_loss(key, objective, score_fn, sde, x0, context, weight, times)


def fdsm_loss(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "B *event"],
    *,
    context: Any = None,
    weight: Weight = noise_weight,
    times: Times = uniform_times,
    num_projections: int = 1,
    step_size: Scalar | None = None,
    probes: Probes = rademacher_probes,
) -> Scalar:
    """Finite-difference sliced score matching of a batch at noised points: `ssm_loss` without
    derivatives of the score (Pang et al. 2020, arXiv 2007.03317). At time t the step is
    `step_size` · sigma(t), by default 0.005 sigma in float32; a network that computes in half
    precision wants about 0.1.
    """
    _check_projections(x0, num_projections, probes)
    _checks.check_positive("step_size", step_size)

    def objective(key: Key, score_fn: ScoreFn, x_t: Array, t: Scalar) -> Scalar:
        directions = probes(key, num_projections, x_t.shape)
        relative = jnp.finfo(x_t.dtype).eps ** (1 / 3) if step_size is None else step_size
        return finite_difference_score_matching(
            score_fn, x_t, directions, step_size=relative * sde.sigma(t)
        )

    return _noised_loss(key, objective, score_fn, sde, x0, context, weight, times)


def _check_projections(x0: Array, num_projections: int, probes: Probes) -> None:
    _checks.check_count("num_projections", num_projections)
    check_law("probes", probes, jnp.shape(x0)[1:])


def _weigh(weight: Weight, sde: SDE, t: Scalar) -> Scalar:
    return _checks.check_scalar("weight", _checks.apply("weight", weight, sde, t), "(sde, t)")


def _noised_loss(
    key: Key,
    objective: Callable,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Array,
    context: Any,
    weight: Weight,
    times: Times,
) -> Scalar:
    """The mean of weight(t) · objective(key, s(·, t), x_t, t)."""

    def noised(key: Key, score_fn: ScoreFn, x0: Array, t: Scalar) -> Scalar:
        x_t, _ = perturb(key, sde, x0, t)
        own_key = jax.random.fold_in(key, _OBJECTIVE)
        return _weigh(weight, sde, t) * objective(own_key, lambda x: score_fn(x, t), x_t, t)

    return _batch_loss(key, noised, score_fn, sde, x0, context, times)


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
    t, importance = _checks.apply("times", times, time_key, sde, x0.shape[0])

    def one(key: Key, x0: Array, t: Scalar, context: Any) -> Scalar:
        conditioned = score_fn if context is None else lambda x, t: score_fn(x, t, context)
        return objective(key, conditioned, x0, t)

    keys = jax.random.split(example_key, x0.shape[0])
    return jnp.mean(importance * jax.vmap(one)(keys, x0, t.astype(x0.dtype), context))
