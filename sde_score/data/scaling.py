"""Standardisation of tabular data, and the log-determinant that takes densities to data units."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar, register_pytree


@register_pytree
@dataclasses.dataclass(frozen=True)
class Standardizer:
    """z = (x − mean) / std on one example x: [d], with log p(x) = log p(z) + log_det.

    `jax.vmap(scale)(table)` maps a table; `log_prob + scale.log_det` is in nats per data unit.
    """

    mean: Float[Array, " d"]
    std: Float[Array, " d"]

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """From data units to zero mean and unit variance."""
        self._check_example("x", x)
        return (x - self.mean) / self.std

    def inverse(self, z: Float[Array, " d"]) -> Float[Array, " d"]:
        """x = mean + std z: back to data units."""
        self._check_example("z", z)
        return self.mean + self.std * z

    @property
    def log_det(self) -> Scalar:
        """log |det ∂z/∂x| = −Σ log std: add it to a log-density of z for that of x."""
        return -jnp.sum(jnp.log(self.std))

    def _check_example(self, name: str, x: Float[Array, " d"]) -> None:
        fix = "For a table of examples, jax.vmap over it."
        _checks.check_shape(name, jnp.shape(x), self.mean.shape, fix)


def standardize(x: Float[Array, "n d"]) -> Standardizer:
    """The `Standardizer` of a table: each column's mean and population standard deviation."""
    _checks.check_data("x", x)
    if jnp.ndim(x) != 2:
        raise _checks.ArgumentError(
            f"`x` must be a table of shape [n, d]; got {jnp.shape(x)}. "
            "Flatten larger examples with x.reshape(len(x), -1)."
        )
    x = jnp.asarray(x)
    _check_varying(x)
    centred = x - x[:1]  # a large common offset would cost digits in the sums
    return Standardizer(mean=x[0] + jnp.mean(centred, axis=0), std=jnp.std(centred, axis=0))


def _check_varying(x: Float[Array, "n d"]) -> None:
    """No column is constant, up to rounding: such data have no density."""
    if not _checks.is_concrete(x):
        return
    rounding = 8 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=0)
    constant = jnp.flatnonzero(jnp.ptp(x, axis=0) <= rounding).tolist()
    if constant:
        raise _checks.ArgumentError(
            f"`x` must vary in every column; columns {constant} are constant, to the rounding of "
            f"{x.dtype}, over {len(x)} rows. Drop them, or subtract a large offset in float64."
        )
