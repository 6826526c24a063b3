"""Linear inverse problems: x given y = A x + noise·z with z ~ N(0, I).

DPS and ΠGDM guide a score by ∇ log N(y; A x̂_0, ·) with x̂_0 = E[x_0 | x_t], and their samples are
not of the posterior p(x | y), as x_0 given x_t is not Gaussian of that covariance; twisted
sequential Monte Carlo weighs its particles for the difference, and converges to it. Against
`GaussianMixture.posterior`, the closed form, `benchmarks/bench_guidance.py` measures each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.operators import Data, Event, LinearOperator
from sde_score.sampling.grid import split_key, uniform_grid
from sde_score.sampling.steps import transition
from sde_score.sde import sample_prior


def dps(
    score_fn: ScoreFn, sde: SDE, operator: LinearOperator, y: Data, *, scale: Scalar
) -> Partial:
    """The score s − (scale/‖r‖) ∇_x ‖r‖² with r = y − A x̂_0, per sample (Chung et al. 2023, arXiv
    2209.14687, alg. 1), at one backward pass of the score more.

    The published rule moves each x_s by −(ζ/‖r‖) ∇ ‖r‖² whatever the step. A step that adds c
    times the score moves it c·scale/ζ as far: as c falls along the grid, by a factor of thousands,
    no one `scale` is that rule.
    """
    _checks.check_positive_number("scale", scale, zero=True)
    y = _check_data(sde, operator, y)
    return bind(_moved, score_fn, sde, operator, y, bind(_minus_distance, scale))


def pgdm(
    score_fn: ScoreFn,
    sde: SDE,
    operator: LinearOperator,
    y: Data,
    *,
    noise: Scalar,
    sigma_data: Scalar = 1.0,
) -> Partial:
    """ΠGDM, the score s + ∇_x log N(y; A x̂_0, r² A Aᵀ + noise² I) with the covariance held fixed
    in x (Song et al. 2023, "Pseudoinverse-guided diffusion models", eq. 7 and 8), at one backward
    pass of the score more.

    r² I is the covariance of x_0 given x_t where x_0 ~ N(0, c² I), c = sigma_data: 1/r² = 1/c² +
    alpha²/sigma², which at c = alpha = 1 is the published sigma²/(1 + sigma²); ΠGDM is exact then.
    """
    _checks.check_positive_number("noise", noise, zero=True)
    _checks.check_positive_number("sigma_data", sigma_data)
    y = _check_data(sde, operator, y)
    log_prob = bind(_log_gaussian, sde, operator, noise, sigma_data)
    return bind(_moved, score_fn, sde, operator, y, log_prob)


class Particles(NamedTuple):
    """Draws x [n, *event] with weights [n] that sum to 1; the number of equally weighted draws
    that they are worth, 1/Σ weights², after each step; an estimate of log p(y), in nats.
    """

    x: Array
    weights: Array
    effective: Array
    log_evidence: Array


def twisted_smc(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    operator: LinearOperator,
    y: Data,
    *,
    noise: Scalar,
    num_particles: int,
    ts: Float[Array, " n"] | None = None,
    sigma_data: Scalar = 1.0,
) -> Particles:
    """Weighted draws of p(x | y) by the twisted diffusion sampler (Wu et al. 2023, arXiv
    2306.17775, alg. 1), along `ts` (100 uniform steps by default).

    Particles step by the reverse chain moved by ΠGDM's guidance, and carry the weights that undo
    the move: as they grow in number they converge to the chain's posterior, and that, as the steps
    do, to the score's. They are resampled, systematically, where less than half are effective: a
    particle depends on the others. With a `sigma_data` below the data's standard deviation weights
    are rarely, and then very, large.
    """
    prior_key, noise_key = split_key(key)
    _checks.check_count("num_particles", num_particles)
    _checks.check_positive_number("noise", noise)
    _checks.check_positive_number("sigma_data", sigma_data)
    y = _check_data(sde, operator, y)
    grid = uniform_grid(sde, 100) if ts is None else ts
    _checks.check_grid(grid, sde)
    _checks.check_end("ts[0]", grid[0], "t1", sde.t1, "The particles start at the prior.")

    def twist(x: Array, t: Scalar, sigma_data: Scalar) -> Twist:
        log_prob = bind(_log_gaussian, sde, operator, noise, sigma_data)
        one = bind(_twist, score_fn, sde, operator, y, log_prob)
        return jax.vmap(one, (0, None))(x, t)

    def advance(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        (x, log_weights, twisted, log_evidence), (index, t, s) = carry, inputs
        resample_key, step_key = jax.random.split(jax.random.fold_in(noise_key, index))
        (x, twisted), log_weights = _resample(resample_key, (x, twisted), log_weights)
        a, v = transition(sde, t, s)
        # That of N(0, sigma_data² I); the mean is right for every law.
        deviation = jnp.sqrt(v * (_variance(sde, sigma_data, s) / _variance(sde, sigma_data, t)))
        z, shift = jax.random.normal(step_key, x.shape, x.dtype), deviation * twisted.slope
        x = ((x + v * twisted.score) / a + deviation * (z + shift)).astype(x.dtype)
        last = index == len(grid) - 2  # where the likelihood is that of x̂_0 itself
        new = twist(x, s, jnp.where(last, 0.0, sigma_data))
        undo = jnp.sum((shift * (z + 0.5 * shift)).reshape(len(x), -1), axis=1)
        log_weights = log_weights + new.value - twisted.value - undo
        total = jax.nn.logsumexp(log_weights)
        effective = 1.0 / jnp.sum(jnp.exp(2.0 * (log_weights - total)))
        return (x, log_weights - total, new, log_evidence + total), effective

    keys = jax.random.split(prior_key, num_particles)
    x = jax.vmap(lambda key: sample_prior(key, sde, operator.like.shape))(keys)
    grid = jnp.asarray(grid, x.dtype)
    start = twist(x, grid[0], sigma_data)
    total = jax.nn.logsumexp(start.value)
    carry = x, start.value - total, start, total - jnp.log(num_particles)
    steps = jnp.arange(len(grid) - 1), grid[:-1], grid[1:]
    carry, effective = jax.lax.scan(advance, carry, steps)
    return Particles(carry[2].x0, jnp.exp(carry[1]), effective, carry[3])


class Twist(NamedTuple):
    """A log-likelihood of y and its gradient in x, the score and x̂_0."""

    value: Array
    slope: Array
    score: Array
    x0: Array


def _resample(key: Key, tree: Any, log_weights: Array) -> tuple[Any, Array]:
    """Systematically, where less than half of the particles are effective."""
    num = log_weights.size
    few = jax.nn.logsumexp(2.0 * log_weights) > jnp.log(2.0 / num)
    places = (jnp.arange(num) + jax.random.uniform(key)) / num
    chosen = jnp.searchsorted(jnp.cumsum(jnp.exp(log_weights)), places)
    index = jnp.where(few, jnp.minimum(chosen, num - 1), jnp.arange(num))
    return jax.tree.map(lambda leaf: leaf[index], tree), jnp.where(few, -jnp.log(num), log_weights)


def _variance(sde: SDE, sigma_data: Scalar, t: Scalar) -> Scalar:
    return (sigma_data * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2


def _log_gaussian(
    sde: SDE, operator: LinearOperator, noise: Scalar, sigma_data: Scalar, r: Data, t: Scalar
) -> Scalar:
    spread = sigma_data * sde.sigma(t) / jnp.sqrt(_variance(sde, sigma_data, t))
    return operator.log_prob(r, spread, noise)


def _minus_distance(scale: Scalar, r: Data, t: Scalar) -> Scalar:
    """−2 scale ‖r‖, as ∇‖r‖²/‖r‖ = 2 ∇‖r‖."""
    square = jnp.sum(r**2)
    return -2.0 * scale * jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)


def _twist(
    score_fn: ScoreFn, sde: SDE, operator: LinearOperator, y: Data, value_fn: Callable, *place: Any
) -> Twist:
    """Of value_fn(y − A x̂_0, t), by one evaluation of the score and one backward pass."""
    x, t = place

    def value(x: Event) -> tuple[Scalar, tuple[Event, Event]]:
        score = _checks.call(score_fn, x, t)
        x0 = (x + sde.sigma(t) ** 2 * score) / sde.alpha(t)
        return value_fn(y - operator(x0), t), (score, x0)

    (height, aux), slope = jax.value_and_grad(value, has_aux=True)(x)
    return Twist(height, slope, *aux)


def _moved(*args: Any) -> Event:
    twist = _twist(*args)
    return (twist.score + twist.slope).astype(twist.score.dtype)


def _check_data(sde: SDE, operator: LinearOperator, y: Any) -> Array:
    """`y` as an array, a datum of the operator's."""
    _checks.check_sde(sde)
    if not isinstance(operator, LinearOperator):
        raise _checks.ArgumentError(
            f"`operator` must be a LinearOperator; got {_checks.describe(operator)}. Make one of "
            "any linear function with linear_operator(fn, shape)."
        )
    _checks.check_data("y", y, _checks.CONVERT)
    fix = "It is one datum, like operator(x): jax.vmap over a batch."
    _checks.check_shape("y", jnp.shape(y), operator.data_shape, fix)
    return jnp.asarray(y)
