"""Densities on the plane to draw from and to evaluate: a model can be compared with the truth.

Each is called as `two_moons(key, num) -> [num, 2]` and has `.log_prob(x: [2]) -> []` in nats,
normalised. All have a standard deviation of about 1 in each coordinate, lie within [−4, 4]² and
are centred (but for the swiss roll's mean, (0.29, 0.03)). The shapes are the usual ones (Grathwohl
et al. 2018, arXiv 1810.01367; the pinwheel is from Johnson et al. 2016, arXiv 1603.06277),
with details chosen so that the density can be computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Scalar

Point = Float[Array, "2"]


@dataclasses.dataclass(frozen=True)
class Density2D:
    """A density on the plane: `density(key, num) -> [num, 2]`; sample i depends on (key, i) only.

    `sample(key) -> [2]` draws one point; `jax.grad(density.log_prob)` is the exact score.
    """

    sample: Callable[[Key], Point]
    log_density: Callable[[Point], Scalar]

    def __call__(self, key: Key, num: int) -> Float[Array, "num 2"]:
        """`num` independent samples."""
        _checks.check_key(key)
        _checks.check_count("num", num)
        return jax.vmap(self.sample)(jax.random.split(key, num))

    def log_prob(self, x: Point) -> Scalar:
        """The log-density at one point, in nats; `jax.vmap` it over several."""
        _checks.check_floating("x", x)
        _checks.check_shape("x", jnp.shape(x), (2,), "For several points, jax.vmap over them.")
        return self.log_density(jnp.asarray(x))


def _mixture(
    x: Point, centres: Float[Array, "k 2"], weights: Float[Array, " k"], std: float
) -> Scalar:
    """log Σ_k w_k N(x; c_k, std² I)."""
    squares = jnp.sum((x[None] - centres) ** 2, axis=1)
    return jax.nn.logsumexp(-squares / (2 * std**2), b=weights) - math.log(2 * math.pi * std**2)


def _noisy_curves(curves: Callable[[Scalar], Float[Array, "m 2"]], noise: float) -> Density2D:
    """p(x) = (1/m) Σ_j ∫₀¹ N(x; c_j(u), noise² I) du: a uniform u on one of m curves, plus noise.

    Gauss–Legendre in u serves open and closed curves alike: 320 nodes on at most 130 noise widths
    of arc. In float64 the error is below 1e-9 nats where log p > −20, and below 1e-4 in [−4, 4]².
    """

    def sample(key: Key) -> Point:
        curve_key, branch_key, noise_key = jax.random.split(key, 3)
        point = jax.random.choice(branch_key, curves(jax.random.uniform(curve_key)))
        return point + noise * jax.random.normal(noise_key, (2,))

    def log_density(x: Point) -> Scalar:
        nodes, weights = (jnp.asarray(array, x.dtype) for array in _gauss_legendre())
        points = jax.vmap(curves)(nodes)
        num_curves = points.shape[1]
        weights = jnp.repeat(weights, num_curves) / num_curves
        return _mixture(x, points.reshape(-1, 2), weights, noise)

    return Density2D(sample, log_density)


@functools.cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(320)
    return (nodes + 1) / 2, weights / 2


def _polar(radius: Scalar, angle: Float[Array, "*k"]) -> Float[Array, "*k 2"]:
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _rotate(x: Point, angle: Scalar) -> Point:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos * x[0] - sin * x[1], sin * x[0] + cos * x[1]])


def _moons(u: Scalar) -> Float[Array, "2 2"]:
    cos, sin = jnp.cos(math.pi * u), jnp.sin(math.pi * u)
    moon = jnp.stack([1.15 * (cos - 0.5), 2.0 * (sin - 0.25)])
    return jnp.stack([moon, -moon])


two_moons = _noisy_curves(_moons, noise=0.1)
"""Two interleaved half ellipses, noise 0.1: the half circles of `make_moons`, standardised."""


def _circles(u: Scalar) -> Float[Array, "2 2"]:
    return jnp.stack([_polar(0.8, 2 * math.pi * u), _polar(1.8, 2 * math.pi * u)])


circles = _noisy_curves(_circles, noise=0.1)
"""Two concentric circles of radii 0.8 and 1.8, noise 0.1; each holds half of the mass."""


def _swiss_roll(u: Scalar) -> Float[Array, "1 2"]:
    angle = 1.5 * math.pi * (1 + 2 * u)
    return _polar(angle / 7, angle)[None]


swiss_roll = _noisy_curves(_swiss_roll, noise=0.1)
"""A spiral of one and a half turns, uniform in the angle, radii 0.67 to 2.02, noise 0.1."""


def _spirals(u: Scalar) -> Float[Array, "2 2"]:
    angle = math.pi * jnp.sqrt(0.25 + 8.75 * u)  # ½π to 3π, uniform in angle²: even along the arm
    arm = _polar(angle / 4.5, angle)
    return jnp.stack([arm, -arm])


two_spirals = _noisy_curves(_spirals, noise=0.08)
"""Two interleaved spirals of one and a quarter turns, radii 0.35 to 2.09, noise 0.08."""


_RADIUS, _STD = 1.4, 0.175


def _eight_centres() -> Float[Array, "8 2"]:
    return _polar(_RADIUS, jnp.arange(8.0) * (math.pi / 4))


def _sample_eight(key: Key) -> Point:
    centre_key, noise_key = jax.random.split(key)
    centre = jax.random.choice(centre_key, _eight_centres())
    return centre + _STD * jax.random.normal(noise_key, (2,))


def _log_eight(x: Point) -> Scalar:
    return _mixture(x, _eight_centres().astype(x.dtype), jnp.full(8, 1 / 8, x.dtype), _STD)


eight_gaussians = Density2D(_sample_eight, _log_eight)
"""Eight equal Gaussians of standard deviation 0.175, evenly on a circle of radius 1.4."""


_MEAN, _LENGTH, _WIDTH, _TWIST = 1.35, 0.4, 0.14, 0.35


def _blade_angles() -> Float[Array, "5"]:
    return jnp.arange(5.0) * (2 * math.pi / 5)


def _twist(x: Point, amount: float) -> Point:
    """x turned by the angle amount ‖x‖²: that moves points along circles and keeps all areas."""
    return _rotate(x, amount * jnp.sum(x**2))


def _sample_pinwheel(key: Key) -> Point:
    blade_key, noise_key = jax.random.split(key)
    along, across = jax.random.normal(noise_key, (2,))
    blade = jnp.stack([_MEAN + _LENGTH * along, _WIDTH * across])
    return _twist(_rotate(blade, jax.random.choice(blade_key, _blade_angles())), _TWIST)


def _log_pinwheel(x: Point) -> Scalar:
    angles = _blade_angles().astype(x.dtype)
    blades = jax.vmap(_rotate, (None, 0))(_twist(x, -_TWIST), -angles)
    along, across = (blades[:, 0] - _MEAN) / _LENGTH, blades[:, 1] / _WIDTH
    log_volume = math.log(angles.size * 2 * math.pi * _LENGTH * _WIDTH)
    return jax.nn.logsumexp(-0.5 * (along**2 + across**2)) - log_volume


pinwheel = Density2D(_sample_pinwheel, _log_pinwheel)
"""Five Gaussian blades, N(1.35, 0.4²) along and N(0, 0.14²) across, turned by 0.35 r² at radius r.

That turn keeps areas (its Jacobian has determinant 1), so the density is a closed form.
"""


def _sample_checkerboard(key: Key) -> Point:
    x_key, row_key, y_key = jax.random.split(key, 3)
    x = jax.random.uniform(x_key, minval=-2.0, maxval=2.0)
    row = jax.random.choice(row_key, jnp.array([-2.0, 0.0])) + jnp.floor(x) % 2
    return jnp.stack([x, row + jax.random.uniform(y_key)])


def _log_checkerboard(x: Point) -> Scalar:
    inside = jnp.all((x >= -2) & (x < 2)) & (jnp.sum(jnp.floor(x)) % 2 == 0)
    return jnp.where(inside, -math.log(8), -jnp.inf).astype(x.dtype)


checkerboard = Density2D(_sample_checkerboard, _log_checkerboard)
"""Uniform on the eight unit squares of one colour of a 4 × 4 board on [−2, 2]².

`log_prob` is −log 8 on them and −inf elsewhere, as it must be; its gradient is 0 and says nothing.
"""
