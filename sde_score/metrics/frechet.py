"""A Fréchet distance between Gaussians fitted to two samples: of features, or of the data.

It is not the FID, whose features are those of one Inception network and of no other.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score._typing import Scalar
from sde_score.metrics.two_sample import GROUPS, Estimate, check_samples


def frechet_distance(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Estimate:
    """‖μ_x − μ_y‖² + tr(C_x + C_y − 2(C_x C_y)^½) (Dowson & Landau 1982, eq. 16), in data units
    squared, of two samples or of `features` of theirs, and its jackknife error.

    The estimate is too large by O(d²/n), the same for all models: compare at equal n, and with
    the value of one half of the data against the other.
    """
    x, y = check_samples(x, y)
    groups = lambda n, g: jnp.arange(n) % GROUPS != g  # noqa: E731
    left_out = jnp.stack(
        [_distance(x, y, groups(len(x), g), groups(len(y), g)) for g in range(GROUPS)]
    )
    everything = _distance(x, y, jnp.ones(len(x), bool), jnp.ones(len(y), bool))
    stderr = jnp.sqrt((GROUPS - 1) * jnp.var(left_out))
    return Estimate(everything, stderr)


def _distance(x: Array, y: Array, in_x: Array, in_y: Array) -> Scalar:
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x, in_x), _moments(y, in_y)
    values, vectors = jnp.linalg.eigh(cov_x)
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]) @ vectors.T
    mixed = jnp.linalg.eigvalsh(root @ cov_y @ root)  # those of C_x C_y, by a symmetric matrix
    overlap = jnp.sum(jnp.sqrt(jnp.maximum(mixed, 0.0)))
    return jnp.sum((mean_x - mean_y) ** 2) + jnp.trace(cov_x + cov_y) - 2.0 * overlap


def _moments(x: Array, kept: Array) -> tuple[Array, Array]:
    weights = kept / jnp.sum(kept)
    mean = weights @ x
    centred = (x - mean[None]) * jnp.sqrt(weights)[:, None]
    return mean, centred.T @ centred * (jnp.sum(kept) / (jnp.sum(kept) - 1))
