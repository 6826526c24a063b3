"""Exact and estimated divergences against the trace of `jax.jacfwd`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sde import within

from sde_score import divergence, gaussian_probes, hutchinson_divergence, rademacher_probes

SHAPES = {"vector": (4,), "image": (2, 2, 1)}
MATRIX = np.random.default_rng(0).normal(size=(4, 4))


def field(x):
    """A nonlinear field with a full, asymmetric Jacobian."""
    flat = x.reshape(-1)
    return (jnp.sin(jnp.asarray(MATRIX, x.dtype) @ flat) * flat[::-1] + flat**3).reshape(x.shape)


def point(shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def jacobian(x):
    return np.asarray(jax.jacfwd(field)(x)).reshape(x.size, x.size)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def x(request, x64):
    return point(request.param)


def test_exact_divergence_is_the_trace(x):
    value, trace = divergence(field, x)
    np.testing.assert_array_equal(value, field(x))
    np.testing.assert_allclose(trace, np.trace(jacobian(x)), rtol=1e-13)  # float64 rounding


def test_hutchinson_over_all_signs_is_the_trace(x):
    """Over all 2^d sign vectors E[v vᵀ] = I exactly, so the mean is the trace and no estimate."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=x.size)))
    value, estimates = hutchinson_divergence(field, x, jnp.asarray(signs.reshape(-1, *x.shape)))
    np.testing.assert_array_equal(value, field(x))
    np.testing.assert_allclose(np.mean(estimates), np.trace(jacobian(x)), rtol=1e-12)
    # each estimate is its own vᵀ J v
    np.testing.assert_allclose(
        estimates, np.einsum("ki,ij,kj->k", signs, jacobian(x), signs), rtol=1e-12, atol=1e-12
    )


PROBES = {"rademacher": rademacher_probes, "gaussian": gaussian_probes}


@pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
def test_probes_are_unbiased_with_their_known_variance(probes, x64):
    """With S the symmetric part of J: variance 2‖S‖² for Gaussian probes, less 2ΣS_ii² for signs
    (Hutchinson 1990).
    """
    x = point((4,))
    keys = jax.random.split(jax.random.key(0), 2_000)
    draw = jax.jit(
        jax.vmap(lambda key: hutchinson_divergence(field, x, probes(key, 2, x.shape))[1])
    )
    estimates = np.asarray(draw(keys)).ravel()  # the two probes of a key are independent
    symmetric = 0.5 * (jacobian(x) + jacobian(x).T)
    diagonal = np.diag(symmetric)
    variance = 2.0 * np.sum(symmetric**2)
    if probes is rademacher_probes:
        variance -= 2.0 * np.sum(diagonal**2)
    within(estimates, diagonal.sum())
    within((estimates - diagonal.sum()) ** 2, variance)


@pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
def test_probes_have_unit_covariance(probes):
    v = np.asarray(probes(jax.random.key(1), 20_000, (3, 1)))
    assert v.shape == (20_000, 3, 1) and v.dtype == np.float32
    within(v[:, :, 0], 0.0)
    within(v * v.transpose(0, 2, 1), np.eye(3))
    assert (set(np.unique(v)) == {-1.0, 1.0}) == (probes is rademacher_probes)


def test_probes_take_the_precision_of_x():
    """float32 or integer probes serve an x of another precision."""
    x = jnp.ones(4, jnp.bfloat16)
    signs = jnp.array([[1, -1, 1, 1], [1, 1, -1, 1]])
    value, estimates = hutchinson_divergence(lambda x: 2.0 * x, x, signs)
    assert value.dtype == estimates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(estimates, [8.0, 8.0])


BAD = {
    "probe shape": (
        lambda: hutchinson_divergence(field, jnp.ones(4), jnp.ones((2, 3))),
        r"`probes` must have shape \(4,\); got \(3,\).*\(2, 3\) for x of shape \(4,\)",
    ),
    "no probe axis": (
        lambda: hutchinson_divergence(field, jnp.ones(4), jnp.ones(4)),
        r"`probes` must have shape \(4,\); got \(\)",
    ),
    "batched fn": (
        lambda: divergence(lambda x: x[None], jnp.ones(4)),
        r"`fn` must return the shape of `x`; got \(1, 4\) for x of shape \(4,\)",
    ),
    "fn of a batch": (lambda: divergence(lambda x: x[:, 0], jnp.ones(4)), "`fn` failed on one"),
    "scalar fn": (
        lambda: hutchinson_divergence(jnp.sum, jnp.ones(4), jnp.ones((1, 4))),
        "`fn` must return the shape",
    ),
    "integers": (lambda: divergence(field, jnp.arange(4)), "`x` must be floating point; got int"),
    "integers, estimated": (
        lambda: hutchinson_divergence(field, jnp.arange(4), jnp.ones((1, 4))),
        "`x` must be floating point; got int",
    ),
    "no probes": (lambda: gaussian_probes(jax.random.key(0), 0, (4,)), "`num`.*at least 1; got 0"),
    "raw key": (lambda: rademacher_probes(jax.random.PRNGKey(0), 1, (4,)), "typed key; got uint"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
