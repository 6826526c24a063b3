"""The oracle against autodiff, scipy, its own samples and quadrature."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from jax.scipy.stats import norm
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from test_sde import sdes, times, within

from sde_score import VP, GaussianMixture, exact_score, gaussian_flow, marginal, posterior_mean

POINTS = np.random.default_rng(0).normal(size=(5, 2))


def scipy_log_prob(weights, means, covariances, x):
    parts = [
        np.log(w) + multivariate_normal(m, c).logpdf(x)
        for w, m, c in zip(weights, means, covariances, strict=True)
    ]
    return logsumexp(parts, axis=0)


def noised(sde, t, weights, means, covariances):
    """The law of alpha x_0 + sigma z, component by component."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return weights, alpha * means, alpha**2 * covariances + sigma**2 * np.eye(means.shape[1])


def random_mixture(k, d, seed=0):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(k, d, d)) / np.sqrt(d)
    weights = rng.uniform(0.5, 1.5, k)
    covariances = factors @ factors.transpose(0, 2, 1) + 0.2 * np.eye(d)
    return weights / weights.sum(), rng.normal(size=(k, d)), covariances


@sdes
def test_marginals_densities_and_scores(sde, x64):
    """p_t is the mixture of N(alpha m, alpha² C + sigma² I): its density is scipy's, its score the
    gradient of it by autodiff, both to 1e-10.
    """
    gmm = GaussianMixture(*mixture(np.float64))

    @jax.jit
    def evaluate(t):
        law = marginal(gmm, sde, t)
        score = jax.vmap(lambda x: exact_score(gmm, sde)(x, t))(POINTS)
        gradient = jax.vmap(jax.grad(law.log_prob))(POINTS)
        return law, jax.vmap(law.log_prob)(POINTS), score, gradient

    for t in times(sde):
        law, log_prob, score, gradient = evaluate(t)
        want = noised(sde, t, *mixture(np.float64))
        for got, value in zip((law.weights, law.means, law.covariances), want, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-13)
        rebuilt = np.einsum(
            "kij,kj,klj->kil", law.spectrum.vectors, law.spectrum.values, law.spectrum.vectors
        )
        np.testing.assert_allclose(rebuilt, want[2], rtol=1e-12, atol=1e-13 * np.max(want[2]))
        np.testing.assert_allclose(log_prob, scipy_log_prob(*want, POINTS), rtol=1e-10)
        np.testing.assert_allclose(score, gradient, rtol=1e-10, atol=1e-12)


def test_64_dimensions(x64):
    parameters = random_mixture(3, 64)
    gmm, x = GaussianMixture(*parameters), np.random.default_rng(1).normal(size=64)
    assert gmm.dim == 64
    want = scipy_log_prob(*noised(VP(), 0.2, *parameters), x)
    law = marginal(gmm, VP(), 0.2)
    log_prob, gradient = jax.jit(jax.value_and_grad(law.log_prob))(x)
    np.testing.assert_allclose(log_prob, want, rtol=1e-10)
    np.testing.assert_allclose(exact_score(gmm, VP())(x, 0.2), gradient, rtol=1e-10, atol=1e-12)


def test_samples():
    """Means, covariances and component weights of 20,000 draws, each within 5 standard errors."""
    weights, means, covariances = mixture(np.float64)
    gmm = GaussianMixture(*mixture())
    keys = jax.random.split(jax.random.key(0), 20_000)
    x, membership = jax.jit(
        lambda gmm, keys: (
            (x := jax.vmap(gmm.sample)(keys)),
            jax.vmap(gmm.responsibilities)(x),
        )
    )(gmm, keys)
    x = np.asarray(x, np.float64)
    mean = weights @ means
    spread = (means - mean)[:, :, None] * (means - mean)[:, None, :]
    covariance = np.einsum("k,kij->ij", weights, covariances + spread)
    within(x, mean)
    within((x - mean)[:, :, None] * (x - mean)[:, None, :], covariance)
    within(membership, weights)  # E p(k | x) = w_k
    first = np.asarray(membership, np.float64)[:, :1]
    within(first * (x - means[0]), 0.0)  # E p(k | x) (x − m_k) = 0
    np.testing.assert_allclose(gmm.mean, mean, rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_allclose(gmm.covariance, covariance, rtol=1e-5)


@sdes
def test_posterior_mean_by_quadrature(sde, x64):
    """E[x_0 | x_t] = ∫ x_0 p(x_0) p(x_t | x_0) dx_0 / p(x_t) on a fine grid; the trapezoidal rule
    converges faster than any power for such densities.
    """
    gmm, t = GaussianMixture(*mixture(np.float64)), 0.35
    axis = np.linspace(-5.0, 5.0, 401)
    x0 = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    prior = scipy_log_prob(*mixture(np.float64), x0)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    for x_t in alpha * np.array([[0.3, 0.2], [-1.0, 1.5]]):
        weight = np.exp(prior - 0.5 * np.sum((x_t - alpha * x0) ** 2, axis=1) / sigma**2)
        want = weight @ x0 / weight.sum()
        got = posterior_mean(gmm, sde, jnp.asarray(x_t), t)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@sdes
def test_gaussian_flow_solves_the_probability_flow(sde, x64):
    """d/d stop of the map is f − ½ g² s at its image; it starts at x and returns to it; and it
    carries p_start to p_stop.
    """
    gmm = GaussianMixture(*random_mixture(1, 3))
    score, x, start = exact_score(gmm, sde), jnp.asarray([0.4, -0.9, 1.3]), 0.2

    @jax.jit
    def evaluate(stop):
        flow = lambda stop: gaussian_flow(gmm, sde, x, start, stop)  # noqa: E731
        y, velocity = jax.jvp(flow, (stop,), (jnp.ones_like(stop),))
        field = sde.drift(y, stop) - 0.5 * sde.diffusion(stop) ** 2 * score(y, stop)
        back = gaussian_flow(gmm, sde, y, stop, start)
        jacobian = jax.jacfwd(lambda x: gaussian_flow(gmm, sde, x, start, stop))(x)
        change = marginal(gmm, sde, start).log_prob(x) - marginal(gmm, sde, stop).log_prob(y)
        return y, velocity, field, back, jnp.linalg.slogdet(jacobian)[1], change

    for stop in (sde.t0, 0.2, 0.6, sde.t1):
        y, velocity, field, back, log_det, change = evaluate(stop)
        if stop == start:
            np.testing.assert_allclose(y, x, rtol=1e-13)
        np.testing.assert_allclose(velocity, field, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(back, x, rtol=1e-11)
        np.testing.assert_allclose(log_det, change, rtol=1e-10, atol=1e-11)


def test_a_mixture_travels():
    """Through tree operations, jit (one trace for two mixtures) and vmap."""
    chex.clear_trace_counter()
    gmm = GaussianMixture(*mixture())
    other = GaussianMixture(*random_mixture(3, 2))
    leaves, structure = jax.tree.flatten(gmm)
    chex.assert_trees_all_equal(jax.tree.unflatten(structure, leaves), gmm)
    assert jax.tree.map(lambda leaf: None, gmm).weights is None  # anything may be a leaf

    @jax.jit
    @chex.assert_max_traces(n=1)
    def both(gmm, sde, x):
        return gmm.log_prob(x), exact_score(gmm, sde)(x, 0.5), posterior_mean(gmm, sde, x, 0.5)

    x = jnp.asarray(POINTS[0], jnp.float32)
    first, second = both(gmm, VP(), x), both(other, VP(beta_max=10.0), x)
    assert not np.allclose(first[0], second[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), gmm, other)
    values = jax.vmap(lambda gmm: gmm.log_prob(x))(stacked)
    np.testing.assert_allclose(values, [first[0], second[0]], rtol=1e-5)  # float32


def test_a_mixture_made_inside_a_trace():
    """From constants and from tracers alike."""
    x = jnp.asarray(POINTS[0], jnp.float32)
    parameters = mixture()
    want = GaussianMixture(*parameters).log_prob(x)
    constant = jax.jit(lambda x: GaussianMixture(*parameters).log_prob(x))(x)
    traced = jax.jit(lambda parameters, x: GaussianMixture(*parameters).log_prob(x))(parameters, x)
    np.testing.assert_allclose([constant, traced], want, rtol=1e-5)


def test_a_replaced_covariance_brings_its_own_spectrum():
    gmm = GaussianMixture(*mixture())
    wide = dataclasses.replace(gmm, covariances=4.0 * gmm.covariances)
    np.testing.assert_allclose(wide.spectrum.values, 4.0 * gmm.spectrum.values, rtol=1e-5)
    assert "spectrum" not in repr(wide) and wide != gmm


def test_posterior_by_bayes_rule(x64):
    """log p(x | y) − log p(x) − log N(y; A x, noise²) is one constant, −log p(y), and that density
    integrates to 1 over y by the trapezoidal rule; in 16 dimensions too.
    """
    gmm, a = GaussianMixture(*mixture(np.float64)), np.array([[1.0, -0.7]])
    operator = lambda x: a @ x  # noqa: E731

    def log_evidence(gmm, operator, y, points):
        posterior = gmm.posterior(operator, y, 0.3)
        likelihood = jax.vmap(lambda x: norm.logpdf(y, operator(x), 0.3).sum())(points)
        return jax.vmap(gmm.log_prob)(points) + likelihood - jax.vmap(posterior.log_prob)(points)

    ys = np.linspace(-6.0, 6.0, 241)
    values = jax.jit(jax.vmap(lambda y: log_evidence(gmm, operator, y[None], POINTS)))(ys)
    np.testing.assert_allclose(values, np.tile(values[:, :1], (1, 5)), rtol=1e-8)
    np.testing.assert_allclose(np.exp(values[:, 0]).sum() * (ys[1] - ys[0]), 1.0, rtol=1e-9)
    rng = np.random.default_rng(3)
    b, gmm = rng.normal(size=(2, 3, 16)), GaussianMixture(*random_mixture(3, 16))
    operator = lambda x: jnp.tensordot(b, x, 1)  # noqa: E731
    arguments = rng.normal(size=(2, 3)), rng.normal(size=(4, 16))
    values = jax.jit(lambda y, points: log_evidence(gmm, operator, y, points))(*arguments)
    np.testing.assert_allclose(values, np.full(4, values[0]), rtol=1e-9)


def test_posterior_without_noise(x64):
    """The known entry is y in every sample; weights and the other's law are the limit of little
    noise; and its marginals have scores.
    """
    gmm, first = GaussianMixture(*mixture(np.float64)), lambda x: x[:1]
    make = jax.jit(lambda noise: gmm.posterior(first, np.array([0.3]), noise))
    posterior, near = make(0.0), make(1e-4)
    draws = jax.jit(jax.vmap(posterior.sample))(jax.random.split(jax.random.key(0), 5))
    np.testing.assert_allclose(draws[:, 0], 0.3, atol=1e-8)  # the root of a rounded eigenvalue
    for got, want in zip(jax.tree.leaves(posterior)[:3], jax.tree.leaves(near)[:3], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert np.isfinite(exact_score(posterior, VP())(jnp.array([0.3, 0.1]), 0.2)).all()


def one(**changes):
    """A standard normal in two dimensions, but for the changes."""
    parameters = {"weights": [1.0], "means": [[0.0, 0.0]], "covariances": [np.eye(2)]}
    return GaussianMixture(**{**parameters, **changes})


BAD = {
    "means": (lambda: one(means=[0.0, 0.0]), r"`means` must have shape \[k, d\]; got \(2,\)"),
    "weights": (lambda: one(weights=[0.5, 0.5]), r"`weights` must have shape \(1,\); got \(2,\)"),
    "covariances": (
        lambda: one(covariances=np.ones((1, 2))),
        r"`covariances` must have shape \(1, 2, 2\); got \(1, 2\)",
    ),
    "weights' sum": (lambda: one(weights=[0.9]), "`weights` must be at least 0 and sum to 1"),
    "negative weight": (
        lambda: GaussianMixture([1.5, -0.5], np.zeros((2, 1)), np.ones((2, 1, 1))),
        "`weights` must be at least 0",
    ),
    "asymmetric": (
        lambda: one(covariances=[[[1.0, 0.5], [0.0, 1.0]]]),
        "`covariances` must be symmetric",
    ),
    "indefinite": (
        lambda: one(covariances=[[[1.0, 2.0], [2.0, 1.0]]]),
        "`covariances` must be positive definite",
    ),
    "nan": (lambda: one(means=[[0.0, np.nan]]), "`means` must be finite; 1 of its 2 values"),
    "batch": (lambda: one().score(jnp.ones((5, 2))), r"`x` must have shape \(2,\).*vmap"),
    "wrong dimension": (lambda: one().log_prob(jnp.ones(3)), r"`x` must have shape \(2,\); got"),
    "raw key": (lambda: one().sample(jax.random.PRNGKey(0)), "`key` must be a typed key"),
    "late": (lambda: posterior_mean(one(), VP(), jnp.ones(2), 1.5), r"`t` must lie in \[t0, t1\]"),
    "posterior's data": (
        lambda: one().posterior(lambda x: x[:1], jnp.ones(2), 0.1),
        r"`y` must have shape \(1,\); got \(2,\)",
    ),
    "negative noise": (
        lambda: one().posterior(lambda x: x[:1], jnp.ones(1), -0.1),
        "`noise` must be finite and at least 0; got -0.1",
    ),
    "flow's time": (
        lambda: gaussian_flow(one(), VP(), jnp.ones(2), 0.0, 0.5),
        r"`t` must lie in \[t0, t1\]",
    ),
    "flow of a mixture": (
        lambda: gaussian_flow(GaussianMixture(*mixture()), VP(), jnp.ones(2), 0.1, 0.5),
        "`gmm` must have one component.*got 3.*probability_flow",
    ),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()


def test_ill_conditioned_covariances_in_float32():
    """Decomposed in double precision: a condition number of 1e8 costs no digits of the score."""
    d, rng = 64, np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spectrum = np.logspace(-8, 0, d)
    covariance = (rotation * spectrum) @ rotation.T
    gmm = GaussianMixture(np.ones(1), np.zeros((1, d)), covariance[None])
    x = rotation @ (np.sqrt(spectrum) * rng.normal(size=d))
    noised = marginal(gmm, VP(), VP().t0)
    alpha, sigma = (np.float64(f(VP().t0)) for f in (VP().alpha, VP().sigma))
    exact = -rotation @ ((rotation.T @ x) / (alpha**2 * spectrum + sigma**2))
    error = np.linalg.norm(noised.score(jnp.asarray(x, jnp.float32)) - exact)
    assert error < 1e-4 * np.linalg.norm(exact)  # float32, for sigma² = 1e-6 under entries of 0.1
    assert np.isfinite(gmm.log_prob(jnp.asarray(x, jnp.float32)))
