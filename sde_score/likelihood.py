"""Log-likelihoods of a score model through its probability-flow ODE, with what is known of their
error, and the bound that its training minimises.

log p_t0(x_0) = log p_t1(x(t1)) + ∫ div(f − ½ g² s) dt along the flow from t0 to t1 (Song et al.
2021, arXiv 2011.13456, eq. 39).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, bind
from sde_score.divergence import rademacher_probes
from sde_score.flow import (
    Likelihood,
    carry,
    draw_probes,
    exact_flow_log_prob,
    flow_log_prob,
    log_prob_of,
)
from sde_score.losses.times import likelihood_times
from sde_score.sampling.continuous import probability_flow_field
from sde_score.sampling.grid import initial_state, split_key
from sde_score.sde import log_snr, perturb, prior_log_prob


def log_likelihood(
    key: Key, score_fn: ScoreFn, sde: SDE, x0: Float[Array, "*event"], **options: Any
) -> Likelihood:
    """log p_t0(x_0) of one example by Hutchinson's trace: `num_probes` and `probes` as for
    `flow_log_prob`, the other options as for `exact_log_likelihood`.
    """
    _checks.check_key(key)
    field, options = _as_flow(score_fn, sde, x0, **options)
    return flow_log_prob(key, field, x0, **options)


def exact_log_likelihood(
    score_fn: ScoreFn, sde: SDE, x0: Float[Array, "*event"], **options: Any
) -> Likelihood:
    """log p_t0(x_0) of one example with the exact trace, at d Jacobian products an evaluation;
    `stderr` is 0.

    Options: `terminal_log_prob(x)`, the log-density at t1 (the prior's by default); `ts`, a
    decreasing grid from t1 to t0; and as for `integrate` `solver`, `rtol`, `atol`, `max_steps`,
    `adjoint`.
    """
    field, options = _as_flow(score_fn, sde, x0, **options)
    return exact_flow_log_prob(field, x0, **options)


def _as_flow(
    score_fn: ScoreFn,
    sde: SDE,
    x0: Array,
    *,
    terminal_log_prob: Callable[[Array], Scalar] | None = None,
    ts: Array | None = None,
    **options: Any,
) -> tuple[Callable, dict[str, Any]]:
    """The flow's field and options."""
    _checks.check_sde(sde)
    _checks.check_data("x0", x0)
    start, stop = sde.t0, sde.t1
    if ts is not None:
        _checks.check_grid(ts, sde)
        fix = "The value is log p_t0: change the SDE's ends with dataclasses.replace."
        _checks.check_end("ts[0]", ts[0], "t1", sde.t1, fix)
        _checks.check_end("ts[-1]", ts[-1], "t0", sde.t0, fix)
        ts = jnp.asarray(ts, _checks.at_least_float32(x0).dtype)[::-1]
        start, stop = ts[0], ts[-1]
    terminal = bind(prior_log_prob, sde) if terminal_log_prob is None else terminal_log_prob
    ends = {"start": start, "stop": stop}
    for name in ends.keys() & options.keys():
        raise _checks.ArgumentError(
            f"`{name}` must not be given: the likelihood is that of p_t0. Change the SDE's ends "
            "with dataclasses.replace."
        )
    options |= ends | {"ts": ts, "terminal_log_prob": terminal}
    return probability_flow_field(score_fn, sde), options


class SampledLikelihood(NamedTuple):
    """A sample, and its `Likelihood`, whose `latent` is where it started."""

    x: Array
    likelihood: Likelihood


def sample_with_log_likelihood(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    shape: tuple[int, ...],
    *,
    num_probes: int = 1,
    probes: Callable = rademacher_probes,
    terminal_log_prob: Callable[[Array], Scalar] | None = None,
    init: Float[Array, "*shape"] | None = None,
    **options: Any,
) -> SampledLikelihood:
    """`sample_ode`'s sample for the key and, accumulated on its way, log p_t0 there: the cost of
    one likelihood. Options as for `integrate`.
    """
    prior_key, probe_key = split_key(key)
    _checks.check_sde(sde)
    latent = initial_state(prior_key, sde, shape, init, sde.t1)
    drawn = draw_probes(probe_key, num_probes, probes, shape)
    field = probability_flow_field(score_fn, sde)
    solution, changes = carry(field, latent, drawn, sde.t1, sde.t0, **options)
    terminal = bind(prior_log_prob, sde) if terminal_log_prob is None else terminal_log_prob
    likelihood = log_prob_of(latent, -changes, solution.num_evals, terminal, exact=False)
    return SampledLikelihood(solution.x, likelihood)


class Bound(NamedTuple):
    """A lower bound of a log-likelihood and its standard error over its draws, in nats: somewhat
    too large, as the times are stratified.
    """

    log_prob: Array
    stderr: Array


def log_likelihood_bound(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x0: Float[Array, "*event"],
    *,
    num_draws: int = 64,
    terminal_log_prob: Callable[[Array], Scalar] | None = None,
) -> Bound:
    """E[log p_t1(x_t1)] − d log(sigma_t0/sigma_t1) − ½ ∫ g² E‖s(x_t, t) − ∇log p(x_t | x_0)‖² dt
    of one example, by `num_draws` draws of t, uniform in log-SNR, and x_t.

    Its mean over data bounds that of log p_t0(x_t0) from below for the *reverse SDE*'s p_t0, x_t0
    being the data with t0's noise (Song et al. 2021, arXiv 2101.09258, thm 3); its negative is
    t1 − t0 times the likelihood-weighted `dsm_loss` but for a constant. The probability flow's
    density is another one: with the exact score and the true terminal density both means are the
    negative entropy of p_t0, with a learned score either may be larger, and single examples
    differ in any case. As E‖∇log p(x_t | x_0)‖² = d/sigma² and div f = d dlog alpha/dt, the
    theorem's other integrals are the logarithm.
    """
    _checks.check_sde(sde)
    _checks.check_key(key)
    _checks.check_data("x0", x0)
    _checks.check_count("num_draws", num_draws)
    x0 = _checks.at_least_float32(x0)
    terminal = bind(prior_log_prob, sde) if terminal_log_prob is None else terminal_log_prob
    time_key, noise_key, end_key = jax.random.split(key, 3)
    ends = jnp.asarray([sde.t0, sde.t1], x0.dtype)
    y, log_sigma = log_snr(sde, ends), jnp.log(sde.sigma(ends))

    def draw(key: Key, end_key: Key, t: Scalar) -> Scalar:
        x_t, noise = perturb(key, sde, x0, t)
        residual = sde.sigma(t) * _checks.call(score_fn, x_t, t) + noise
        x_t1, _ = perturb(end_key, sde, x0, ends[1])
        log_prob = _checks.check_scalar("terminal_log_prob", terminal(x_t1), "one example")
        return log_prob - 0.5 * (y[0] - y[1]) * jnp.sum(residual**2)

    times, _ = likelihood_times(time_key, sde, num_draws)
    noise_keys, end_keys = (jax.random.split(key, num_draws) for key in (noise_key, end_key))
    draws = jax.vmap(draw)(noise_keys, end_keys, times.astype(x0.dtype))
    value = jnp.mean(draws) - x0.size * (log_sigma[0] - log_sigma[1])
    return Bound(value, jnp.std(draws, ddof=1) / jnp.sqrt(num_draws))
