"""Score matching on one example, for a score without time; `jax.vmap` and average over a batch.

Hyvärinen (2005, thm 1): J = E[tr(∂s/∂x) + ½‖s‖²] = ½ E‖s − ∇log p‖² − ½ E‖∇log p‖². The sliced
forms replace the trace by vᵀ (∂s/∂x) v with E[v vᵀ] = I (Song et al. 2019, arXiv 1905.07088).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar, ScoreFn
from sde_score.divergence import check_probes, divergence, jacobian_products


def explicit_score_matching(
    score_fn: ScoreFn, true_score: ScoreFn, x: Float[Array, "*event"]
) -> Scalar:
    """½‖s(x) − ∇log p(x)‖², the Fisher divergence's integrand, where the true score is known
    (Hyvärinen 2005, eq. 2).
    """
    _checks.check_data("x", x)
    x = _checks.at_least_float32(x)
    difference = _checks.call(score_fn, x) - _checks.call(true_score, x, name="true_score")
    return 0.5 * jnp.sum(difference**2)


def implicit_score_matching(score_fn: ScoreFn, x: Float[Array, "*event"]) -> Scalar:
    """tr(∂s/∂x) + ½‖s‖², with the exact trace (Hyvärinen 2005, eq. 4)."""
    _checks.check_data("x", x)
    x = _checks.at_least_float32(x)
    score, trace = divergence(_checked(score_fn), x)
    return trace + 0.5 * jnp.sum(score**2)


def sliced_score_matching(
    score_fn: ScoreFn,
    x: Float[Array, "*event"],
    probes: Float[Array, "m *event"],
    *,
    variance_reduced: bool = True,
) -> Scalar:
    """The mean over probes v of vᵀ (∂s/∂x) v + ½‖s‖², or + ½ (vᵀ s)² if not variance-reduced (Song
    et al. 2019, sec. 3.2 and 3.3).

    Both need E[v vᵀ] = I, as `rademacher_probes`, `gaussian_probes` and `sphere_probes` have. Unit
    vectors are refused where the probes' values are known; made inside jit or vmap they are not
    seen.
    """
    _checks.check_data("x", x)
    x = _checks.at_least_float32(x)
    check_probes(probes, x)
    score, products = jacobian_products(_checked(score_fn), x, probes)
    trace = sum(jnp.sum(v * jv) for v, jv in zip(probes, products, strict=True)) / len(products)
    if variance_reduced:
        return trace + 0.5 * jnp.sum(score**2)
    return trace + 0.5 * sum(jnp.sum(v * score) ** 2 for v in probes) / len(products)


def finite_difference_score_matching(
    score_fn: ScoreFn,
    x: Float[Array, "*event"],
    probes: Float[Array, "m *event"],
    *,
    step_size: Scalar | None = None,
) -> Scalar:
    """The mean over probes v of vᵀ (s₊ − s₋)/(2h) + ⅛‖s₊ + s₋‖², s± = s(x ± h v): sliced score
    matching, variance-reduced, to O(h²), by two evaluations and no derivative (Pang et al. 2020,
    arXiv 2007.03317).

    h = `step_size` rounded to a power of two, so that x ± h v is exact for signs; by default near
    the cube root of the dtype's precision (0.004 in float32), which suits an x of about unit size.
    """
    _checks.check_data("x", x)
    if step_size is not None:
        _checks.check_positive_number("step_size", step_size)
    x = _checks.at_least_float32(x)
    check_probes(probes, x)
    h = jnp.asarray(jnp.finfo(x.dtype).eps ** (1 / 3) if step_size is None else step_size, x.dtype)
    h = jnp.exp2(jnp.round(jnp.log2(h)))
    directions = h * probes.astype(x.dtype)
    points = x[None] + jnp.concatenate([directions, -directions])
    above, below = jnp.split(jax.vmap(lambda x: _checks.call(score_fn, x))(points), 2)
    trace = jnp.sum(directions * (above - below)) / (2.0 * h**2)
    return (trace + 0.125 * jnp.sum((above + below) ** 2)) / len(probes)


def single_sigma_score_matching(
    key: Key, score_fn: ScoreFn, x: Float[Array, "*event"], *, sigma: Scalar
) -> Scalar:
    """Denoising score matching at one noise level: ½‖s(x̃) + (x̃ − x)/sigma²‖², x̃ = x + sigma z
    (Vincent 2011, sec. 4).

    Its minimum is the score of the data with noise, p * N(0, sigma² I); `propose_sigma` proposes a
    sigma. Computed as ½‖sigma s + z‖²/sigma²; the variance grows as sigma → 0.
    """
    _checks.check_key(key)
    _checks.check_data("x", x)
    _checks.check_positive_number("sigma", sigma)
    x = _checks.at_least_float32(x)
    noise = jax.random.normal(key, x.shape, x.dtype)
    residual = sigma * _checks.call(score_fn, x + sigma * noise) + noise
    return 0.5 * jnp.sum(residual**2) / sigma**2


def _checked(score_fn: ScoreFn) -> Callable:
    """An error names the caller's argument, not the divergence's."""
    return lambda x: _checks.call(score_fn, x)
