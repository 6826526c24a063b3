"""How far apart are the distributions behind two samples? A value and its standard error.

MMD² and the energy distance are one U-statistic under two kernels k (Sejdinovic et al. 2013):

    U = Σ_{i≠j} k(x_i, x_j)/n(n−1) + Σ_{i≠j} k(y_i, y_j)/m(m−1) − 2 Σ_{i,j} k(x_i, y_j)/nm.

It needs only the row sums of the kernel matrix, and so does its jackknife: leaving out x_i moves U
by −2(h_i − h̄)/(n−1) exactly, with h_i = Σ_{j≠i} k(x_i, x_j)/(n−2) − Σ_j k(x_i, y_j)/m. Hence
stderr² = 4 var(h)/n plus the same over y, var with divisor n − 1 (Efron & Stein 1981).

Every function takes x: [n, *event] and y: [m, *event] with n, m ≥ 4; all but `c2st` may be jitted.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar, bind

Kernel = Callable[[Array], Array]  # of squared distances; a pytree

_ROWS = 64  # rows of a kernel matrix computed together
_MEDIAN_POINTS = 500  # for a median good to about 2 %
GROUPS = 10  # of the delete-a-group jackknife
_FOLDS = 5  # of the classifier test's cross-validation


class Estimate(NamedTuple):
    """A number and its standard error, in the same unit."""

    value: Scalar
    stderr: Scalar


class Classifier(Protocol):
    """A scikit-learn estimator, or anything that `sklearn.base.clone` can copy."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Classifier": ...

    def predict(self, X: np.ndarray) -> np.ndarray: ...


def mmd(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    bandwidth: Scalar | None = None,
) -> Estimate:
    """Unbiased squared MMD with k(x, y) = exp(−‖x − y‖²/2h²) (Gretton et al. 2012, eq. 3).

    `bandwidth` h, in data units, defaults to `median_bandwidth(x, y)`; fix one to compare models.
    The value has no unit and may be negative. The standard error takes h as given. Where the two
    distributions are equal, U is degenerate and the standard error √2 times too large.
    """
    x, y = check_samples(x, y)
    if bandwidth is None:
        return _u_statistic(bind(_gaussian, _median_distance(jnp.concatenate([x, y]))), x, y)
    _checks.check_shape("bandwidth", jnp.shape(bandwidth), (), "Give one length for all axes.")
    _checks.check_positive("bandwidth", bandwidth)
    return _u_statistic(bind(_gaussian, bandwidth), x, y)


def energy_distance(x: Float[Array, "n *event"], y: Float[Array, "m *event"]) -> Estimate:
    """Unbiased 2E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖, in data units (Székely & Rizzo 2013).

    The square of a metric, yet an estimate may be negative. The standard error is as for `mmd`.
    """
    return _u_statistic(bind(_negative_distance), *check_samples(x, y))


def median_bandwidth(x: Float[Array, "n *event"], y: Float[Array, "m *event"]) -> Scalar:
    """Median of ‖z_i − z_j‖, i < j, in the pooled sample z (Gretton et al. 2012, section 8).

    In data units. Of more than 500 pooled points, a random but fixed 500 serve: good to about 2 %.
    """
    return _median_distance(jnp.concatenate(check_samples(x, y)))


def sliced_wasserstein(
    key: Key,
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    num_directions: int = 128,
) -> Estimate:
    """Sliced distance (E_θ W₂²(θᵀX, θᵀY))^½, θ uniform on the sphere (Bonneel et al. 2015).

    In data units. A slice's W₂² = ∫(F⁻¹(u) − G⁻¹(u))² du is exact for the two empirical laws, also
    where n ≠ m. The standard error adds two jackknives: over groups of points, over directions.

    Biased upwards: two samples of one law are one to two standard deviations times (1/n + 1/m)^½
    apart. The standard error leaves that floor out; measure it on two samples of the reference.
    """
    _checks.check_key(key)
    _checks.check_count("num_directions", num_directions, 2)
    return _sliced_wasserstein(key, *check_samples(x, y), num_directions)


def c2st(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    classifier: Classifier | None = None,
    seed: int = 0,
) -> Estimate:
    """Held-out accuracy of a classifier of x against y; ½ if equal (Lopez-Paz & Oquab 2017).

    Over 5 stratified folds. The standard error is binomial; near ½ the spread is a quarter larger,
    as the folds share training points (Bengio & Grandvalet 2004). The larger sample is cut to the
    size of the smaller at random, so that chance is ½. `classifier` defaults to extremely
    randomised trees (Geurts et al. 2006): no scaling, no schedule, strong at a few hundred points.
    `seed` fixes the cut, the folds and the default's trees. Not for `jit`; needs scikit-learn.
    """
    try:
        from sklearn.ensemble import ExtraTreesClassifier
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    except ImportError as error:
        fix = "pip install 'sde_score[experiments]'"
        raise ImportError(f"`c2st` needs scikit-learn: {fix}") from error
    samples = [np.asarray(sample) for sample in check_samples(x, y)]
    num = min(map(len, samples))
    _checks.check_count("min(len(x), len(y))", num, _FOLDS)
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.permutation(sample)[:num] for sample in samples])
    labels = np.repeat([0, 1], num)
    if classifier is None:
        classifier = ExtraTreesClassifier(200, min_samples_leaf=3, random_state=seed)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    predictions = cross_val_predict(classifier, points, labels, cv=folds)
    accuracy = float(np.mean(predictions == labels))
    return Estimate(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / labels.size)))


def check_samples(x: Array, y: Array) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Both samples checked, flattened and in one dtype of at least float32."""
    for name, sample in (("x", x), ("y", y)):
        _checks.check_data(name, sample)
        _checks.check_count(f"len({name})", (jnp.shape(sample) or (0,))[0], 4)
    fix = "It is that of `x`: the leading axis counts the points."
    _checks.check_shape("y.shape[1:]", y.shape[1:], x.shape[1:], fix)
    dtype = jnp.result_type(x, y, jnp.float32)
    return (
        jnp.reshape(jnp.asarray(x, dtype), (x.shape[0], -1)),
        jnp.reshape(jnp.asarray(y, dtype), (y.shape[0], -1)),
    )


@jax.jit
def _u_statistic(kernel: Kernel, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Estimate:
    """U and its jackknife standard error, in the symbols of the module's docstring."""
    n, m = x.shape[0], y.shape[0]
    points = jnp.concatenate([x, y])

    def row_sums(point: Array) -> tuple[Array, Array]:
        values = kernel(_squared_distances(point, points))
        return jnp.sum(values[:n]), jnp.sum(values[n:])

    over_x, over_y = jax.lax.map(row_sums, points, batch_size=_ROWS)  # never n × m numbers at once
    diagonal = kernel(jnp.zeros((), x.dtype))
    xx, xy = over_x[:n] - diagonal, over_y[:n]
    yx, yy = over_x[n:], over_y[n:] - diagonal
    value = jnp.mean(xx / (n - 1) - xy / m) + jnp.mean(yy / (m - 1) - yx / n)
    var_x = jnp.var(xx / (n - 2) - xy / m, ddof=1)
    var_y = jnp.var(yy / (m - 2) - yx / n, ddof=1)
    return Estimate(value, 2.0 * jnp.sqrt(var_x / n + var_y / m))


def _squared_distances(point: Float[Array, " d"], points: Float[Array, "k d"]) -> Array:
    # ‖a‖² + ‖b‖² − 2aᵀb would be faster for images, but cancels for close points far from 0.
    return jnp.sum((point[None] - points) ** 2, axis=-1)


def _gaussian(bandwidth: Scalar, squared_distance: Array) -> Array:
    tiny = jnp.finfo(squared_distance.dtype).tiny  # the median is 0 if most points coincide
    return jnp.exp(-squared_distance / jnp.maximum(2.0 * bandwidth**2, tiny))


def _negative_distance(squared_distance: Array) -> Array:
    return -jnp.sqrt(squared_distance)


@jax.jit
def _median_distance(points: Float[Array, "k d"]) -> Scalar:
    chosen = np.random.default_rng(0).permutation(points.shape[0])[:_MEDIAN_POINTS]
    points = points[chosen]
    rows = partial(_squared_distances, points=points)
    squared = jnp.sort(jnp.ravel(jax.lax.map(rows, points, batch_size=_ROWS)))
    num = len(chosen)
    middle = num + num * (num - 1) // 2  # first the zeros of the diagonal, then each pair twice
    return jnp.mean(jnp.sqrt(squared[middle - 1 : middle + 1]))


@partial(jax.jit, static_argnames="num_directions")
def _sliced_wasserstein(
    key: Key, x: Float[Array, "n d"], y: Float[Array, "m d"], num_directions: int
) -> Estimate:
    direction_key, x_key, y_key = jax.random.split(key, 3)
    directions = jax.random.normal(direction_key, (x.shape[1], num_directions), x.dtype)
    directions /= jnp.linalg.norm(directions, axis=0, keepdims=True)
    centre = jnp.mean(x, axis=0, keepdims=True)  # W₂ does not see it, float32 products do
    x, y = (jnp.matmul(points - centre, directions, precision="highest") for points in (x, y))

    sorted_x, sorted_y = jnp.sort(x, axis=0), jnp.sort(y, axis=0)
    slices = _squared_w2(sorted_x, sorted_y)
    without_direction = jnp.maximum(jnp.sum(slices) - slices, 0.0) / (num_directions - 1)
    without_x = _without_groups(x_key, lambda rest: jnp.mean(_squared_w2(rest, sorted_y)), x)
    without_y = _without_groups(y_key, lambda rest: jnp.mean(_squared_w2(sorted_x, rest)), y)
    variance = (
        _jackknife_variance(jnp.sqrt(without_direction), num_directions)
        + _jackknife_variance(jnp.sqrt(without_x), x.shape[0])
        + _jackknife_variance(jnp.sqrt(without_y), y.shape[0])
    )
    return Estimate(jnp.sqrt(jnp.mean(slices)), jnp.sqrt(variance))


def _squared_w2(sorted_x: Float[Array, "n k"], sorted_y: Float[Array, "m k"]) -> Array:
    """∫(F⁻¹(u) − G⁻¹(u))² du of each column: steps between the multiples of 1/n and 1/m."""
    n, m = sorted_x.shape[0], sorted_y.shape[0]
    breaks = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # whole, in units of 1/nm
    widths = jnp.asarray(np.diff(breaks) / (n * m), sorted_x.dtype)
    gaps = sorted_x[breaks[:-1] // m] - sorted_y[breaks[:-1] // n]
    return jnp.sum(widths[:, None] * gaps**2, axis=0)


def _without_groups(
    key: Key, statistic: Callable[[Array], Scalar], slices: Float[Array, "n k"]
) -> Float[Array, " groups"]:
    """`statistic` of the sorted columns, leaving out one random group of rows at a time."""
    num = slices.shape[0]
    size = num // min(GROUPS, num)
    shuffled = jax.random.permutation(key, slices)  # data may be ordered by class

    def without(first: Array) -> Scalar:
        rows = jnp.arange(num - size)
        return statistic(jnp.sort(shuffled[rows + size * (rows >= first)], axis=0))

    return jax.lax.map(without, size * jnp.arange(min(GROUPS, num)))


def _jackknife_variance(replicates: Float[Array, " groups"], num: int) -> Scalar:
    """var(θ_g)(n − d)²/nd, where θ_g lacks the d units of group g (Shao & Wu 1989).

    For n = gd this is the usual (g − 1)/g Σ(θ_g − θ̄)².
    """
    size = num // replicates.shape[0]
    return jnp.var(replicates, ddof=1) * (num - size) ** 2 / (num * size)
