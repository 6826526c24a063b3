"""Conversions between score, noise, denoiser and velocity, against each other and the oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from jax.tree_util import Partial
from test_sde import sdes, within

from sde_score import (
    VE,
    VP,
    GaussianMixture,
    denoise,
    denoiser_from_score,
    dynamic_threshold,
    exact_score,
    noise_from_score,
    perturb,
    posterior_mean,
    precondition,
    score_from_denoiser,
    score_from_noise,
    score_from_preconditioned,
    score_from_velocity,
    static_threshold,
    velocity_from_score,
)

PAIRS = {
    "noise": (noise_from_score, score_from_noise),
    "denoiser": (denoiser_from_score, score_from_denoiser),
    "velocity": (velocity_from_score, score_from_velocity),
}
X = np.array([0.7, -1.1])


def close(got, want, rtol):
    """Equal to `rtol` of the largest entry."""
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.max(np.abs(want)))


@sdes
def test_round_trips(sde, x64):
    score = lambda x, t: jnp.cos(x) + t  # noqa: E731
    for there, back in PAIRS.values():
        for t in (0.1, 0.5, sde.t1):
            # float64 rounding, times 1/sigma² for the denoiser: 1e-16 · 2e3 at VE's t = 0.1
            close(back(sde, there(sde, score))(jnp.asarray(X), t), score(X, t), 1e-12)


@sdes
def test_one_draw_of_noise_gives_every_target(sde, x64):
    """From x_t = alpha x_0 + sigma z: noise z, denoiser x_0, velocity alpha z − sigma x_0 all mean
    the score −z/sigma.
    """
    t = 0.4
    x0 = jnp.asarray(X)
    x_t, z = perturb(jax.random.key(0), sde, x0, t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    constant = lambda value: lambda x, t: value  # noqa: E731
    target = -z / sigma
    close(score_from_noise(sde, constant(z))(x_t, t), target, 1e-12)
    close(score_from_denoiser(sde, constant(x0))(x_t, t), target, 1e-12)
    velocity = alpha * z - sigma * x0
    close(score_from_velocity(sde, constant(velocity))(x_t, t), target, 1e-12)
    close(noise_from_score(sde, constant(target))(x_t, t), z, 1e-12)
    close(denoiser_from_score(sde, constant(target))(x_t, t), x0, 1e-12)
    close(velocity_from_score(sde, constant(target))(x_t, t), velocity, 1e-12)


@sdes
def test_tweedie_with_the_exact_score_is_the_posterior_mean(sde, x64):
    gmm = GaussianMixture(*mixture(np.float64))
    score, x = exact_score(gmm, sde), jnp.asarray(X)
    for t in (sde.t0, 0.2, sde.t1):
        # rounding 1e-16, over alpha(t1) = 0.0066 for VP
        close(denoise(score, sde, x, t), posterior_mean(gmm, sde, x, t), 1e-10)
        close(denoiser_from_score(sde, score)(x, t), denoise(score, sde, x, t), 1e-15)


def coefficients(sde, t, sigma_data):
    """c_in, c_skip, c_out and c_noise, read off `precondition` by what it does to simple
    networks.
    """
    apply = lambda net: precondition(sde, net, sigma_data=sigma_data)(jnp.ones(()), t)  # noqa: E731
    c_skip = apply(lambda x, c: jnp.zeros_like(x))
    c_out = apply(lambda x, c: jnp.ones_like(x)) - c_skip
    c_in = (apply(lambda x, c: x) - c_skip) / c_out
    c_noise = (apply(lambda x, c: c) - c_skip) / c_out
    return tuple(float(c) for c in (c_in, c_skip, c_out, c_noise))


def test_preconditioning_at_alpha_one_is_table_1_of_edm(x64):
    s, sd = VE().sigma(0.3), 0.5
    table = (
        1.0 / np.sqrt(s**2 + sd**2),
        sd**2 / (s**2 + sd**2),
        s * sd / np.sqrt(s**2 + sd**2),
        np.log(s) / 4.0,
    )
    np.testing.assert_allclose(coefficients(VE(), 0.3, sd), table, rtol=1e-12)


@sdes
def test_preconditioned_input_and_target_have_unit_variance(sde, x64):
    """Karras et al. 2022, app. B.6: Var[c_in x_t] = 1 and Var[(x_0 − c_skip x_t)/c_out] = 1 for
    data of standard deviation sigma_data; and of all c_skip this one makes c_out least.
    """
    sd, t = 0.8, 0.35
    c_in, c_skip, c_out, c_noise = coefficients(sde, t, sd)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    np.testing.assert_allclose(c_in**2 * (alpha**2 * sd**2 + sigma**2), 1.0, rtol=1e-12)
    variance = lambda skip: (1.0 - skip * alpha) ** 2 * sd**2 + (skip * sigma) ** 2  # noqa: E731
    np.testing.assert_allclose(variance(c_skip) / c_out**2, 1.0, rtol=1e-11)
    assert min(variance(1.01 * c_skip), variance(0.99 * c_skip)) > variance(c_skip)
    np.testing.assert_allclose(c_noise, 0.25 * np.log(sigma / alpha), rtol=1e-10)
    x0 = sd * jax.random.normal(jax.random.key(1), (20_000,))
    x_t, _ = perturb(jax.random.key(2), sde, x0, t)
    within((c_in * np.asarray(x_t)) ** 2, 1.0)
    within(((np.asarray(x0) - c_skip * np.asarray(x_t)) / c_out) ** 2, 1.0)


def network(x, c_noise, *context):
    return jnp.sin(3.0 * x) + 0.1 * c_noise + sum(context)


@sdes
def test_score_from_preconditioned(sde):
    """It is the score of `precondition`'s denoiser, exactly; and keeps its digits in float32 near
    t0, where that one loses them.
    """

    def both(dtype, t):
        x, t = jnp.asarray(X, dtype), jnp.asarray(t, dtype)
        stable = score_from_preconditioned(sde, network, sigma_data=0.5)
        naive = score_from_denoiser(sde, precondition(sde, network, sigma_data=0.5))
        return np.asarray(stable(x, t), np.float64), np.asarray(naive(x, t), np.float64)

    with jax.enable_x64(True):
        for t in (0.1, 0.5, sde.t1):
            close(*both(jnp.float64, t), 1e-10)
        exact = both(jnp.float64, np.float32(sde.t0))[0]
    errors = [
        np.max(np.abs(got - exact)) / np.max(np.abs(exact)) for got in both(jnp.float32, sde.t0)
    ]
    assert errors[0] < 2e-6, errors  # a few float32 roundings
    if type(sde) is not VE:  # VE's sigma_min of 0.01 leaves the naive path four digits
        assert errors[1] > 20.0 * errors[0], errors


CONVERSIONS = {
    **{there.__name__: there for there, _ in PAIRS.values()},
    **{back.__name__: back for _, back in PAIRS.values()},
    "precondition": lambda sde, fn: precondition(sde, fn, sigma_data=0.5),
    "static_threshold": lambda sde, fn: static_threshold(fn, bound=0.3 * sde.diffusion(1.0)),
    "dynamic_threshold": lambda sde, fn: dynamic_threshold(
        fn, quantile=0.9 * sde.t1, bound=0.1 * sde.diffusion(1.0)
    ),
    "score_from_preconditioned": lambda sde, fn: score_from_preconditioned(
        sde, fn, sigma_data=0.5
    ),
}
conversions = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)


@conversions
def test_conversions_travel_through_jit(convert):
    """New parameters or another SDE of the type do not retrace."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def evaluate(fn, x, t):
        return fn(x, t)

    def fn(scale, x, t):
        return scale * x + t

    x, t = jnp.asarray(X, jnp.float32), jnp.float32(0.5)
    values = [
        np.asarray(evaluate(convert(sde, Partial(fn, jnp.float32(scale))), x, t))
        for sde, scale in ((VP(), 1.0), (VP(), 2.0), (VP(beta_max=10.0), 2.0))
    ]
    assert not np.allclose(values[0], values[1]) and not np.allclose(values[1], values[2])


@conversions
def test_context_passes_through(convert):
    x, t = jnp.asarray(X, jnp.float32), jnp.float32(0.5)
    direct = convert(VP(), lambda x, c: network(x, c, 0.7))(x, t)
    np.testing.assert_allclose(convert(VP(), network)(x, t, jnp.float32(0.7)), direct, rtol=1e-6)
    assert not np.allclose(direct, convert(VP(), network)(x, t))


@conversions
def test_a_batched_network_is_refused(convert):
    with pytest.raises(ValueError, match=r"must return the shape of `x`; got \(1, 2\)"):
        convert(VP(), lambda x, t: x[None])(jnp.ones(2), 0.5)


def test_thresholds_bound_the_clean_example(x64):
    """Static: clipped. Dynamic: the quantile q of |x̂_0| becomes the bound, if it is above it."""
    x = jnp.asarray([0.2, -0.5, 1.5, -3.0])
    same = lambda x, t: x  # noqa: E731
    clipped = static_threshold(same, bound=1.0)(x, 0.5)
    np.testing.assert_array_equal(clipped, [0.2, -0.5, 1.0, -1.0])
    half = dynamic_threshold(same, quantile=0.5)(x, 0.5)  # the median of |x| is 1, the bound
    np.testing.assert_array_equal(half, clipped)
    scaled = dynamic_threshold(same, quantile=1.0, bound=2.0)(x, 0.5)
    np.testing.assert_allclose(scaled, np.asarray(x) * 2.0 / 3.0, rtol=1e-15)
    inside = dynamic_threshold(same)(0.3 * x, 0.5)
    np.testing.assert_array_equal(inside, 0.3 * x)
    score = score_from_denoiser(VP(), static_threshold(same, bound=0.1))
    assert np.all(np.abs(denoise(score, VP(), x, 0.5)) <= 0.1 + 1e-12)
    with pytest.raises(ValueError, match="`bound` must be finite and above 0; got 0.0"):
        static_threshold(same, bound=0.0)
    with pytest.raises(ValueError, match=r"`quantile` must lie in \(0, 1\]; got 2"):
        dynamic_threshold(same, quantile=2)


@pytest.mark.parametrize("wrapper", [precondition, score_from_preconditioned])
def test_sigma_data_is_positive(wrapper):
    with pytest.raises(ValueError, match="`sigma_data` must be finite and above 0; got 0.0"):
        wrapper(VP(), network, sigma_data=0.0)
