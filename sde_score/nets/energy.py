"""Energies and the scores they make; and, of any score, whether an energy could have made it.

p(x) = e^{−E(x)}/Z, so that log p = −E − log Z and ∇log p = −∇E, free of the unknown Z (LeCun et
al. 2006; Song & Kingma 2021, arXiv 2101.03288, sec. 2). A score that is −∇E is conservative:
its Jacobian is symmetric, and its line integrals depend on their ends only. A score with time is
closed over it: `lambda x: score_fn(x, t)`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Scalar, ScoreFn, bind
from sde_score.divergence import check_directions
from sde_score.nets.embedding import fourier_embedding, geometric_frequencies

Event = Float[Array, "*event"]


class EnergyMLP(nn.Module):
    """An MLP (x: [*event]) -> [] or (x, t: []) -> [] on one example: E up to a constant, in nats.

    Layer i is activation(Dense(h) + Dense(embedding of t)), the second term only where a time is
    given, as it then must be to `init` too. The activation must be smooth: training by a score
    takes two derivatives, implicit and sliced score matching take three. With swish E
    grows or falls linearly far from the data: add ½ c ‖x‖² where e^{−E} must have an integral.
    Parameters are float32, computed in `dtype`.
    """

    widths: tuple[int, ...] = (50, 50, 50)
    activation: Callable[[Array], Array] = nn.swish
    dtype: jnp.dtype | None = None

    def __post_init__(self) -> None:
        _checks.check_count("len(widths)", len(self.widths))
        for i, width in enumerate(self.widths):
            _checks.check_count(f"widths[{i}]", width)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Event, t: Scalar | None = None) -> Scalar:
        _checks.check_floating("x", x)
        x = jnp.asarray(x)
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)  # noqa: E731
        if t is not None:
            fix = "One example has one time: jax.vmap over both."
            _checks.check_shape("t", jnp.shape(t), (), fix)
            features = fourier_embedding(t, geometric_frequencies(16, 0.05, 10.0)).astype(x.dtype)
            embedding = nn.swish(dense(self.widths[0], "embed")(features))
        h = x.reshape(-1)
        for i, width in enumerate(self.widths):
            h = dense(width, f"layer_{i}")(h)
            if t is not None:
                h = h + dense(width, f"time_{i}")(embedding)
            h = self.activation(h)
        return nn.Dense(1, use_bias=False, dtype=self.dtype, name="output")(h)[0].astype(x.dtype)


def score_from_energy(energy_fn: Callable) -> Partial:
    """s(x, ...) = −∇_x E(x, ...) for a scalar energy E(x), E(x, t) or E(x, t, context).

    The log-density is −E up to a constant, log Z, which may depend on t and on the context.
    """
    return bind(_score_from_energy, energy_fn)


def _score_from_energy(energy_fn: Callable, x: Event, *rest: Array) -> Event:
    _checks.check_floating("x", x)

    def energy(x: Event) -> Scalar:
        return _checks.check_scalar("energy_fn", energy_fn(x, *rest), f"x of shape {x.shape}")

    return -jax.grad(energy)(jnp.asarray(x))


def curl(score_fn: ScoreFn, x: Event, probes: Float[Array, "k *event"] | None = None) -> Scalar:
    """‖J − Jᵀ‖²/(4‖J‖²) with J = ∂s/∂x at x: 0 for a gradient field, 1 for a pure rotation.

    It is the antisymmetric part's share of J in the squared Frobenius norm: with J = S + A, S = Sᵀ
    and A = −Aᵀ are orthogonal, so ‖J‖² = ‖S‖² + ‖A‖², and J − Jᵀ = 2A. No unit; 0 where J = 0.

    As E‖Mv‖² = ‖M‖² for E[v vᵀ] = I, it is Σ‖Jv − Jᵀv‖²/(2Σ‖Jv‖² + 2Σ‖Jᵀv‖²) over probes v, at one
    jvp and one vjp each. `probes` None takes the basis: exact, for small d. With k random probes,
    as `rademacher_probes` has, the mean is off by O(1/k); the range, 0 and 1 stay exact.
    """
    _checks.check_data("x", x)
    x = jnp.asarray(x)
    if probes is None:
        probes = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    check_directions(probes, x)
    _, pushforward = jax.linearize(lambda x: _checks.call(score_fn, x), x)
    pullback = jax.linear_transpose(pushforward, x)
    probes = probes.astype(x.dtype)
    jv, vj = jax.vmap(pushforward)(probes), jax.vmap(pullback)(probes)[0]
    total = 2.0 * jnp.sum(jv**2 + vj**2)
    return jnp.sum((jv - vj) ** 2) / jnp.where(total > 0, total, 1.0)


def log_density_ratio(score_fn: ScoreFn, x: Event, y: Event, *, num_points: int = 32) -> Scalar:
    """log p(y) − log p(x) = ∫₀¹ s(x + u(y − x))·(y − x) du, in nats, free of Z.

    By Gauss–Legendre quadrature on `num_points` points: exact where the integrand is a polynomial
    of degree 2 num_points − 1 in u. Along the straight line: for a score that is not conservative
    (see `curl`) another path has another value.
    """
    for name, value in (("x", x), ("y", y)):
        _checks.check_data(name, value)
    x, y = jnp.asarray(x), jnp.asarray(y)
    _checks.check_shape("y", y.shape, x.shape, "It is that of `x`, one example.")
    _checks.check_count("num_points", num_points)
    nodes, weights = np.polynomial.legendre.leggauss(num_points)  # on [−1, 1]
    step = y - x

    def slope(u: Scalar) -> Scalar:
        return jnp.sum(_checks.call(score_fn, x + u * step) * step)

    slopes = jax.vmap(slope)(jnp.asarray((nodes + 1) / 2, x.dtype))
    return jnp.sum(jnp.asarray(weights / 2, x.dtype) * slopes)
