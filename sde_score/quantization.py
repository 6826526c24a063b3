"""Integers as continuous data: uniform dequantisation, and the code length of a density."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar


def bits_per_dim(
    log_prob: Scalar, num_dims: int, *, num_levels: int, data_range: tuple[float, float]
) -> Scalar:
    """−log_prob/(D ln 2) − log2(w): the code length of integers from a log-density, in nats, of
    their dequantisations, in bits for each of the D numbers of an example.

    w = (high − low)/num_levels is the width of a level in the units of the model's data: an
    offset of 8 bits for 256 levels in [0, 1], 7 in [−1, 1].
    """
    _checks.check_floating("log_prob", log_prob)
    _checks.check_count("num_dims", num_dims)
    width = _bin_width(num_levels, data_range)
    bits = -log_prob / (num_dims * jnp.log(2.0)) - jnp.log2(width)
    if _checks.is_concrete(bits) and not np.mean(bits) >= 0:
        raise _checks.ArgumentError(
            f"`log_prob` must not give less than 0 bits/dim; got {np.mean(bits):.3g} on average, "
            f"for {num_dims} numbers of {num_levels} levels in {data_range}. Integers need codes: "
            "check `num_levels` and `data_range`, that the data were dequantised, and that "
            "log_prob is in nats of a whole example."
        )
    return bits


def uniform_dequantize(
    key: Key, levels: Array, *, num_levels: int, data_range: tuple[float, float]
) -> Float[Array, "*shape"]:
    """low + (high − low) (levels + u)/num_levels with u ~ U[0, 1), for integers 0 … num_levels − 1
    (Theis et al. 2016, arXiv 1511.01844, sec. 3.1).

    The mean log-density of the result plus D ln w, w the width of a level as in `bits_per_dim`,
    bounds the log-probability of the integers from below.
    """
    _checks.check_key(key)
    width = _bin_width(num_levels, data_range)
    levels = jnp.asarray(levels)
    if not jnp.issubdtype(levels.dtype, jnp.integer):
        raise _checks.ArgumentError(
            f"`levels` must be integers 0 … {num_levels - 1}; got {levels.dtype}. Undo the "
            "scaling of the data first."
        )
    known = np.asarray(levels) if _checks.is_concrete(levels) else np.zeros(1)  # numpy widens 256
    if np.any(known < 0) or np.any(known >= num_levels):
        raise _checks.ArgumentError(
            f"`levels` must lie in 0 … {num_levels - 1}; got {_checks.describe(levels)}. Raise "
            "`num_levels`."
        )
    low, high = data_range
    x = low + width * (levels + jax.random.uniform(key, levels.shape))
    return jnp.minimum(x, jnp.nextafter(jnp.asarray(high, x.dtype), -jnp.inf))  # of rounding up


def _bin_width(num_levels: int, data_range: tuple[float, float]) -> float:
    _checks.check_count("num_levels", num_levels, 2)
    if not (np.shape(data_range) == (2,) and -np.inf < data_range[0] < data_range[1] < np.inf):
        raise _checks.ArgumentError(
            f"`data_range` must be (low, high) with low < high; got {data_range}. It is what the "
            "model sees of the integers' range: (0, 1) or (-1, 1), say."
        )
    return (data_range[1] - data_range[0]) / num_levels
