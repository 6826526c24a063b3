"""Continuous normalizing flows: any vector field whose ODE carries data to a known density.

With dx/dt = v(x, t) from the data at `start` to the base at `stop`, log p(x) = log p_base(x(stop))
+ ∫ div v dt (Chen et al. 2018, arXiv 1806.07366, thm 1; FFJORD: Grathwohl et al. 2018, arXiv
1810.01367, eq. 4 and 8). A score model's probability flow is such a flow: `log_likelihood` solves
it, and `flow_loss` trains it on, with probability_flow_field(score_fn, sde) for a field.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar
from sde_score.diffeq import Field, Solution, solve_ode_with_log_density
from sde_score.divergence import check_law, gaussian_probes, rademacher_probes, sphere_probes
from sde_score.sampling.continuous import integrate, on_the_way


class Likelihood(NamedTuple):
    """log p(x) and the standard error of its trace estimate, in nats; the latent code, x at the
    base's end; and evaluations of field and trace.
    """

    log_prob: Array
    stderr: Array
    latent: Array
    num_evals: Array


def flow_log_prob(
    key: Key,
    field: Field,
    x: Float[Array, "*event"],
    *,
    num_probes: int = 1,
    probes: Callable = rademacher_probes,
    **options: Any,
) -> Likelihood:
    """log p(x) of one example under the flow of `field`, the trace estimated by `num_probes`
    probes that are drawn once (Hutchinson).

    The mean over probes has a Student t error with num_probes − 1 degrees of freedom and scale
    `stderr`, which is nan for one probe. In few dimensions (d ≤ 8) take `gaussian_probes` or the
    exact trace: signs take too few values there. Options as for `exact_flow_log_prob`.
    """
    _checks.check_key(key)
    _checks.check_data("x", x)
    drawn = draw_probes(key, num_probes, probes, jnp.shape(x))
    return _log_prob(field, x, drawn, **options)


def exact_flow_log_prob(field: Field, x: Float[Array, "*event"], **options: Any) -> Likelihood:
    """log p(x) of one example with the exact trace, at d Jacobian products an evaluation;
    `stderr` is 0.

    Options: `start` and `stop`, the times of data and base (0 and 1 by default);
    `terminal_log_prob(x)`, the log-density at `stop` (the standard normal's by default); `solver`,
    `ts`, `rtol`, `atol`, `max_steps` as for `integrate`, and `adjoint`, which reverse-mode
    gradients need.
    """
    _checks.check_data("x", x)
    return _log_prob(field, x, None, **options)


def flow_loss(
    key: Key,
    field: Field,
    batch: Float[Array, "B *event"],
    *,
    adjoint: diffrax.AbstractAdjoint | None = None,
    **options: Any,
) -> Scalar:
    """The mean of −log p over a batch, in nats, with a probe for each example: maximum likelihood
    through the ODE. Options as for `flow_log_prob`; the adjoint, diffrax's
    RecursiveCheckpointAdjoint by default, as for `integrate`.
    """
    _checks.check_key(key)
    _checks.check_data("batch", batch)
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    one = lambda key, x: flow_log_prob(key, field, x, adjoint=adjoint, **options).log_prob  # noqa: E731
    return -jnp.mean(jax.vmap(one)(jax.random.split(key, len(batch)), batch))


def sample_flow(
    key: Key,
    field: Field,
    shape: tuple[int, ...],
    *,
    start: Scalar = 0.0,
    stop: Scalar = 1.0,
    init: Float[Array, "*shape"] | None = None,
    **options: Any,
) -> Float[Array, "*shape"]:
    """One sample: `init`, by default a draw of N(0, I), carried from the base at `stop` back to
    the data at `start`. Options as for `integrate`.
    """
    _checks.check_key(key)
    _checks.check_event_shape(shape)
    x = jax.random.normal(key, shape) if init is None else init
    _checks.check_shape("init", jnp.shape(x), shape, "It is x at `stop`, of one sample.")
    return integrate(field, x, start=stop, stop=start, **options).x


def draw_probes(
    key: Key, num_probes: int, probes: Callable, shape: tuple[int, ...]
) -> Float[Array, "num_probes *shape"]:
    """`num_probes` probes of an example's shape, of a law with E[v vᵀ] = I."""
    _checks.check_key(key)
    _checks.check_count("num_probes", num_probes)
    if probes not in (rademacher_probes, gaussian_probes, sphere_probes):
        check_law("probes", probes, shape)
    return probes(key, num_probes, shape)


def carry(
    field: Field,
    x: Float[Array, "*event"],
    probes: Float[Array, "k *event"] | None,
    start: Scalar,
    stop: Scalar,
    *,
    adjoint: diffrax.AbstractAdjoint | None = None,
    **options: Any,
) -> tuple[Solution, Float[Array, " k"]]:
    """x moved from `start` to `stop`, and ∫ div v dt along the way by each probe (or exactly)."""
    x, start, stop, how = on_the_way(x, start, stop, **options)
    probes = None if probes is None else probes.astype(x.dtype)
    return solve_ode_with_log_density(field, x, probes, start, stop, **how, adjoint=adjoint)


def log_prob_of(
    latent: Float[Array, "*event"],
    changes: Float[Array, " k"],
    num_evals: Array,
    terminal_log_prob: Callable[[Array], Scalar] | None,
    *,
    exact: bool,
) -> Likelihood:
    """The terminal log-density at `latent` and the mean of `changes`, with its standard error."""
    terminal = standard_normal_log_prob if terminal_log_prob is None else terminal_log_prob
    log_prob = _checks.check_scalar("terminal_log_prob", terminal(latent), "one example")
    if exact:
        stderr = jnp.zeros_like(changes[0])
    elif changes.size == 1:
        stderr = jnp.full_like(changes[0], jnp.nan)
    else:
        stderr = jnp.std(changes, ddof=1) / jnp.sqrt(changes.size)
    return Likelihood(log_prob + jnp.mean(changes), stderr, latent, num_evals)


def _log_prob(
    field: Field,
    x: Array,
    probes: Array | None,
    *,
    start: Scalar = 0.0,
    stop: Scalar = 1.0,
    terminal_log_prob: Callable[[Array], Scalar] | None = None,
    **options: Any,
) -> Likelihood:
    solution, changes = carry(field, x, probes, start, stop, **options)
    return log_prob_of(
        solution.x, changes, solution.num_evals, terminal_log_prob, exact=probes is None
    )


def standard_normal_log_prob(x: Float[Array, "*event"]) -> Scalar:
    """log N(x; 0, I), in nats."""
    return -0.5 * jnp.sum(x**2) - 0.5 * x.size * jnp.log(2.0 * jnp.pi)
