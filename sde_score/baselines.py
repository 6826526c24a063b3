"""Scores estimated from data without a network, by kernels: what a trained score has to beat.

All use the Gaussian kernel of width h, in data units. A function `data: [n, *event]` -> `score_fn`
returns a pytree, called on one example; it reads all n points at each call, so evaluate many
examples with `jax.lax.map(score_fn, x, batch_size=64)`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar, bind
from sde_score.metrics.two_sample import median_bandwidth

_ROWS = 64  # rows of a matrix of distances computed together
_GRID, _ROUNDS = 9, 4  # each round narrows the bracket of a bandwidth fourfold, in its logarithm


def scott_bandwidth(x: Float[Array, "n *event"]) -> Scalar:
    """n^{−1/(d+4)} σ̄ (Scott 1992, eq. 6.42), σ̄² the mean over the d coordinates of the variance
    (divisor n − 1).

    One width for all coordinates: meant for data of about equal scales, such as standardised ones.
    """
    points = _points("x", x)
    num, dim = points.shape
    return num ** (-1 / (dim + 4)) * _spread(points)


def silverman_bandwidth(x: Float[Array, "n *event"]) -> Scalar:
    """(4/(d + 2))^{1/(d+4)} times `scott_bandwidth`: the least asymptotic mean integrated squared
    error of a normal's density (Silverman 1986, eq. 4.14).
    """
    dim = _points("x", x).shape[1]
    return (4 / (dim + 2)) ** (1 / (dim + 4)) * scott_bandwidth(x)


def cross_validated_bandwidth(x: Float[Array, "n *event"]) -> Scalar:
    """The h of the largest leave-one-out likelihood Σ_i log 1/(n−1) Σ_{j≠i} N(x_i; x_j, h² I), to
    about 1 % (Habbema et al. 1974; Silverman 1986, sec. 3.4.4). O(n² d) time, O(n) memory.

    Where the derivative in h is 0, d h² is the mean over i of Σ_j w_ij ‖x_i − x_j‖², with weights
    that fall as the distance grows. So the mean square distance to the nearest neighbour and that
    to all other points bound d h² from below and above, whatever the data: a grid in log h between
    them is narrowed round its best point, 4 times. If every point has a duplicate, the likelihood
    has no maximum: ArgumentError outside `jit`, h = 0 inside.
    """
    points = _points("x", x)
    if _checks.is_concrete(x) and _all_duplicated(np.asarray(points)):
        raise _checks.ArgumentError(
            "`x` must have a point without a duplicate, else the leave-one-out likelihood grows "
            "without bound as h → 0. Dequantise, or remove the duplicates with jnp.unique."
        )
    return _cross_validate(points)


def propose_sigma(x: Float[Array, "n *event"]) -> Scalar:
    """A noise level for `single_sigma_score_matching`: n^{1/(d+4)} `cross_validated_bandwidth`/6.

    The undivided number is the standard deviation for which Scott's rule gives the cross-validated
    width: for a normal its own, for a mixture about that of a part. The factor is measured: over
    2-D densities of `sde_score.data` and normals, with 10,000 points, the sigma of the least
    Fisher divergence to the data's own score was within a factor of 2 of the proposal. Fewer
    points or a network that overfits want more.
    """
    points = _points("x", x)
    num, dim = points.shape
    return num ** (1 / (dim + 4)) * cross_validated_bandwidth(x) / 6


def kernel_density_log_prob(data: Float[Array, "n *event"], bandwidth: Scalar) -> Partial:
    """x ↦ log 1/n Σ_j N(x; x_j, h² I), in nats."""
    return bind(_kernel_density_log_prob, *_kernel(data, bandwidth))


def kernel_density_score(data: Float[Array, "n *event"], bandwidth: Scalar) -> Partial:
    """x ↦ (Σ_j w_j x_j − x)/h², w = softmax(−‖x − x_j‖²/2h²): ∇ `kernel_density_log_prob`.

    This is also the least denoising loss's score at sigma = h on these points (Vincent 2011).
    """
    return bind(_kernel_density_score, *_kernel(data, bandwidth))


def stein_score(
    data: Float[Array, "n *event"], *, bandwidth: Scalar | None = None, ridge: Scalar = 1.0
) -> Partial:
    """The Stein gradient estimator (Li & Turner 2018, arXiv 1705.07107), at any x.

    Stein's identity E_y[k(x, y) ∇log p(y) + ∇_y k(x, y)] = 0, over the points by ridge
    regression, gives their scores G = −(K + ridge I)⁻¹ B, B_i = Σ_j ∇_{x_j} k(x_i, x_j) (sec.
    3.1). A new x joins the points as one more (sec. 3.4; Shi et al. 2018, arXiv 1806.02925, extend
    another estimator): eliminating all but its row from the system of n + 1 leaves

        s(x) = −[Σ_j (1 + u_j) k_j (x − x_j)/h² + Σ_j k_j G_j] / (1 + ridge − kᵀu),

    k_j = k(x, x_j), u = (K + ridge I)⁻¹ k. At x_i, which then counts twice, s(x_i) is not G_i.
    Here k = exp(−‖x − y‖²/2h²), h = `bandwidth`, by default the median distance of the points:
    mixtures want less. O(n³) time and n² numbers once, O(n²) time a call.
    """
    points = _points("data", data)
    _checks.check_positive("ridge", ridge)
    if bandwidth is None:
        _checks.check_count("len(data)", len(points), 8)
        bandwidth = median_bandwidth(points[::2], points[1::2])  # of all: it pools them
    data, bandwidth = _kernel(data, bandwidth)

    def row(x: Array) -> tuple[Array, Array]:
        k = _gaussian(points, bandwidth, x)
        return k, (jnp.sum(k) * x - _matmul(k, points)) / bandwidth**2

    kernel, divergence = jax.lax.map(row, points, batch_size=_ROWS)
    factor = jnp.linalg.cholesky(kernel + ridge * jnp.eye(len(points), dtype=points.dtype))
    scores = -jax.scipy.linalg.cho_solve((factor, True), divergence)
    return bind(_stein_score, data, bandwidth, ridge, factor, scores)


def _points(name: str, data: Float[Array, "n *event"]) -> Float[Array, "n d"]:
    """Checked, one example a row, in at least float32."""
    _checks.check_data(name, data)
    if jnp.ndim(data) < 2 or jnp.shape(data)[0] < 2:
        raise _checks.ArgumentError(
            f"`{name}` must be [n, *event] with n ≥ 2 examples; got shape {jnp.shape(data)}. "
            "Numbers become vectors with [:, None]."
        )
    return _checks.at_least_float32(data).reshape(len(data), -1)


def _kernel(data: Array, bandwidth: Scalar) -> tuple[Array, Array]:
    """Both checked, in one dtype."""
    points = _points("data", data).reshape(jnp.shape(data))
    fix = "Give one length for all axes."
    _checks.check_shape("bandwidth", jnp.shape(bandwidth), (), fix)
    _checks.check_positive("bandwidth", bandwidth)
    return points, jnp.asarray(bandwidth, points.dtype)


def _spread(points: Float[Array, "n d"]) -> Scalar:
    return jnp.sqrt(jnp.mean(jnp.var(points, axis=0, ddof=1)))


def _squares(points: Float[Array, "n d"], x: Float[Array, " d"]) -> Float[Array, " n"]:
    return jnp.sum((points - x[None]) ** 2, axis=1)


def _gaussian(points: Float[Array, "n d"], bandwidth: Scalar, x: Float[Array, " d"]) -> Array:
    return jnp.exp(-_squares(points, x) / (2 * bandwidth**2))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _example(data: Float[Array, "n *event"], x: Float[Array, "*event"]) -> Float[Array, " d"]:
    """x as a vector, in the dtype of the data."""
    _checks.check_floating("x", x)
    fix = "The baselines take one example: jax.vmap over a batch."
    _checks.check_shape("x", jnp.shape(x), data.shape[1:], fix)
    return jnp.asarray(x, data.dtype).reshape(-1)


def _kernel_density_log_prob(
    data: Float[Array, "n *event"], bandwidth: Scalar, x: Float[Array, "*event"]
) -> Scalar:
    squares = _squares(data.reshape(len(data), -1), _example(data, x))
    volume = 0.5 * x.size * math.log(2 * math.pi) + x.size * jnp.log(bandwidth)
    return jax.nn.logsumexp(-squares / (2 * bandwidth**2)) - math.log(len(data)) - volume


def _kernel_density_score(
    data: Float[Array, "n *event"], bandwidth: Scalar, x: Float[Array, "*event"]
) -> Float[Array, "*event"]:
    points, flat = data.reshape(len(data), -1), _example(data, x)
    weights = jax.nn.softmax(-_squares(points, flat) / (2 * bandwidth**2))
    return ((_matmul(weights, points) - flat) / bandwidth**2).reshape(x.shape)


def _stein_score(
    data: Float[Array, "n *event"],
    bandwidth: Scalar,
    ridge: Scalar,
    factor: Float[Array, "n n"],
    scores: Float[Array, "n d"],
    x: Float[Array, "*event"],
) -> Float[Array, "*event"]:
    points, flat = data.reshape(len(data), -1), _example(data, x)
    k = _gaussian(points, bandwidth, flat)
    u = jax.scipy.linalg.cho_solve((factor, True), k)
    v = (1 + u) * k
    total = (jnp.sum(v) * flat - _matmul(v, points)) / bandwidth**2 + _matmul(k, scores)
    return (-total / (1 + ridge - jnp.sum(k * u))).reshape(x.shape)


@jax.jit
def _cross_validate(points: Float[Array, "n d"]) -> Scalar:
    num, dim = points.shape
    indices = jnp.arange(num)

    def others(x: Array, index: Array) -> Array:
        """Squared distances, that to the point itself infinite."""
        return jnp.where(indices == index, jnp.inf, _squares(points, x))

    def nearest(args: tuple[Array, Array]) -> Array:
        return jnp.min(others(*args))

    def narrow(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        grid = jnp.linspace(*bracket, _GRID)

        def leave_one_out(args: tuple[Array, Array]) -> Array:
            squares = others(*args)
            return jax.vmap(lambda h: jax.nn.logsumexp(-squares / (2 * h**2)))(jnp.exp(grid))

        sums = jax.lax.map(leave_one_out, (points, indices), batch_size=_ROWS)
        best = jnp.argmax(jnp.mean(sums, axis=0) - dim * grid)
        return grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, _GRID - 1)]

    closest = jax.lax.map(nearest, (points, indices), batch_size=_ROWS)
    low = jnp.sqrt(jnp.mean(closest) / dim)
    bracket = jax.lax.fori_loop(
        0, _ROUNDS, narrow, (jnp.log(low), jnp.log(math.sqrt(2) * _spread(points)))
    )
    return jnp.where(low > 0, jnp.exp(0.5 * sum(bracket)), 0.0)


def _all_duplicated(points: np.ndarray) -> bool:
    return bool(np.all(np.unique(points, axis=0, return_counts=True)[1] > 1))
