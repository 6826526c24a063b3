"""Score matching on one example, for a score without time; `jax.vmap` and average over a batch.

Hyvärinen (2005, thm 1): J = E[tr(∂s/∂x) + ½‖s‖²] = ½ E‖s − ∇log p‖² − ½ E‖∇log p‖². The sliced
forms replace the trace by vᵀ (∂s/∂x) v with E[v vᵀ] = I (Song et al. 2019, arXiv 1905.07088).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar, ScoreFn
from sde_score.divergence import divergence, jacobian_products


def explicit_score_matching(
    score_fn: ScoreFn, true_score: ScoreFn, x: Float[Array, "*event"]
) -> Scalar:
    """½‖s(x) − ∇log p(x)‖², the Fisher divergence's integrand, where the true score is known."""
    _checks.check_data("x", x)
    difference = _checks.call(score_fn, x) - _checks.call(true_score, x, name="true_score")
    return 0.5 * jnp.sum(difference**2)


def implicit_score_matching(score_fn: ScoreFn, x: Float[Array, "*event"]) -> Scalar:
    """tr(∂s/∂x) + ½‖s‖², with the exact trace (Hyvärinen 2005, eq. 4)."""
    _checks.check_data("x", x)
    score, trace = divergence(_checked(score_fn), x)
    return trace + 0.5 * jnp.sum(score**2)


def sliced_score_matching(
    score_fn: ScoreFn,
    x: Float[Array, "*event"],
    probes: Float[Array, "m *event"],
    *,
    variance_reduced: bool = True,
) -> Scalar:
    """The mean over probes v of vᵀ (∂s/∂x) v + ½‖s‖² (Song et al. 2019, eq. 9), or + ½ (vᵀ s)²
    (eq. 8) if not reduced.

    Both need E[v vᵀ] = I, as `rademacher_probes` and `gaussian_probes` have.
    """
    _checks.check_data("x", x)
    score, products = jacobian_products(_checked(score_fn), x, probes)
    trace = sum(jnp.sum(v * jv) for v, jv in zip(probes, products, strict=True)) / len(products)
    if variance_reduced:
        return trace + 0.5 * jnp.sum(score**2)
    return trace + 0.5 * sum(jnp.sum(v * score) ** 2 for v in probes) / len(products)


def _checked(score_fn: ScoreFn) -> Callable:
    """An error names the caller's argument, not the divergence's."""
    return lambda x: _checks.call(score_fn, x)
