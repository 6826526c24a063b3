"""Score matching: identities between the losses, their minima and their inputs."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from jax.tree_util import Partial
from test_sde import sdes, within

from sde_score import (
    VP,
    GaussianMixture,
    denoising_score_matching,
    dsm_loss,
    esm_loss,
    exact_score,
    explicit_score_matching,
    fdsm_loss,
    finite_difference_score_matching,
    gaussian_probes,
    implicit_score_matching,
    ism_loss,
    likelihood_times,
    likelihood_weight,
    log_snr,
    marginal,
    noise_weight,
    sliced_score_matching,
    ssm_loss,
)

MATRIX = np.array([[-0.9, 0.4], [-0.2, -0.5]])
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=2)))


def linear(x, t=0.0):
    return jnp.asarray(MATRIX, x.dtype) @ x + 0.3 + t


def bent(x, t=0.0):
    """A nonlinear score with a full, asymmetric Jacobian."""
    return jnp.tanh(jnp.asarray(MATRIX, x.dtype).T @ x + t) - 0.3 * x * x[::-1]


MEAN, COVARIANCE = np.array([0.5, -0.3]), np.array([[0.5, 0.2], [0.2, 0.8]])
MODELS = {"linear": linear, "bent": bent}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
ESM = functools.partial(esm_loss, true_score=lambda x, t: -x)  # the truth for N(0, I) under VP
LOSSES = {"dsm": dsm_loss, "esm": ESM, "ism": ism_loss, "ssm": ssm_loss, "fdsm": fdsm_loss}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@sdes
def test_denoising_less_implicit_is_a_constant(sde, x64):
    """E[DSM] − E[ISM] = ½ d E_t[weight/sigma²] for every model: d/2 with the noise weight, ½ d
    (log_snr(t0) − log_snr(t1))/(t1 − t0) with the likelihood weight.

    The two losses draw the same times and noise from the same key, so their difference is paired.
    """

    def scaled(model):  # of the size of a score at every noise level, VE's 50 included
        return lambda x, t: model(x / (1.0 + sde.sigma(t)), t) / (1.0 + sde.sigma(t))

    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(32, 2)))

    @jax.jit
    @jax.vmap
    def differences(key):
        def pair(model, **options):
            denoising = dsm_loss(key, scaled(model), sde, x0, **options)
            return denoising - ism_loss(key, scaled(model), sde, x0, **options)

        likelihood = {"weight": likelihood_weight, "times": likelihood_times}
        return jnp.stack([pair(linear), pair(bent), pair(bent, **likelihood)])

    with jax.debug_key_reuse(False):  # common random numbers are the point
        got = np.asarray(differences(jax.random.split(jax.random.key(0), 500)))
    slope = (log_snr(sde, sde.t0) - log_snr(sde, sde.t1)) / (sde.t1 - sde.t0)
    within(got, np.array([1.0, 1.0, slope]))
    within(got[:, 0] - got[:, 1], 0.0)
    # The constant is found to a few per cent: a missing ½ or a flipped sign is far away.
    assert np.all(got.std(0) / np.sqrt(len(got)) < 0.05 * got.mean(0))


@sdes
def test_denoising_objective_closed_form(sde, x64):
    """With s = −(c/sigma) x and x_0 = 0 the residual is (1 − c) z, so the mean is ½ (1 − c)² d
    weight/sigma².
    """
    t, x0 = 0.3, jnp.zeros(3)
    sigma = sde.sigma(t)
    keys = jax.random.split(jax.random.key(1), 4_000)

    def draw(c, weight):
        score = lambda x, t: -c * x / sigma**2  # noqa: E731
        return jax.vmap(
            lambda key: denoising_score_matching(key, score, sde, x0, t, weight=weight)
        )(keys)

    within(draw(0.4, noise_weight), 0.5 * 0.36 * 3)
    with jax.debug_key_reuse(False):
        within(draw(-1.0, noise_weight), 0.5 * 4.0 * 3)  # the flipped sign costs 4 × ½ d
        squared = float(sde.diffusion(t) ** 2 / sigma**2)
        within(draw(0.4, likelihood_weight), 0.5 * 0.36 * 3 * squared)
        np.testing.assert_allclose(draw(1.0, noise_weight), 0.0, atol=1e-28)


@models
def test_implicit_is_the_trace_plus_half_the_square(model, x64):
    x = jnp.asarray([0.7, -1.2])
    want = np.trace(jax.jacfwd(model)(x)) + 0.5 * np.sum(np.asarray(model(x)) ** 2)
    np.testing.assert_allclose(implicit_score_matching(model, x), want, rtol=1e-13)


@models
@pytest.mark.parametrize("variance_reduced", [False, True])
def test_sliced_over_all_signs_is_implicit(model, variance_reduced, x64):
    """Over all 2^d sign vectors E[v vᵀ] = I exactly."""
    for x in jnp.asarray([[0.7, -1.2], [2.0, 0.1]]):
        sliced = sliced_score_matching(
            model, x, jnp.asarray(SIGNS), variance_reduced=variance_reduced
        )
        np.testing.assert_allclose(sliced, implicit_score_matching(model, x), rtol=1e-12)


def test_sliced_is_implicit_in_expectation(x64):
    """With Gaussian probes, plain and variance-reduced."""
    x = jnp.asarray([0.7, -1.2])
    keys = jax.random.split(jax.random.key(2), 5_000)

    @jax.jit
    @jax.vmap
    def draw(key):
        v = gaussian_probes(key, 2, x.shape)
        plain = sliced_score_matching(bent, x, v, variance_reduced=False)
        return jnp.stack([sliced_score_matching(bent, x, v), plain])

    got = np.asarray(draw(keys))
    within(got, float(implicit_score_matching(bent, x)))


def test_one_sign_vector_is_exact_for_a_diagonal_jacobian(x64):
    """Variance-reduced, where vᵀ D v = tr D for every v; not plain, as (vᵀ s)² varies."""
    x, score = jnp.asarray([0.7, -1.2]), lambda x: -(x**3)
    one = lambda **options: sliced_score_matching(score, x, jnp.asarray(SIGNS[:1]), **options)  # noqa: E731
    exact = implicit_score_matching(score, x)
    np.testing.assert_allclose(one(), exact, rtol=1e-14)
    assert abs(one(variance_reduced=False) - exact) > 0.1


def test_explicit_is_implicit_plus_half_the_fisher_information(x64):
    """E[½‖s − ∇log p‖²] = E[tr ∂s + ½‖s‖²] + ½ E‖∇log p‖² (Hyvärinen 2005, thm 1), by the
    trapezoidal rule over a mixture, which converges faster than any power.
    """
    gmm = GaussianMixture(*mixture(np.float64))
    axis = np.linspace(-5.0, 5.0, 161)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)

    @jax.jit
    @jax.vmap
    def integrands(x):
        zero = lambda x: jnp.zeros_like(x)  # noqa: E731
        values = [explicit_score_matching(zero, gmm.score, x)]  # ½‖∇log p‖²
        for model in MODELS.values():
            values += [
                explicit_score_matching(model, gmm.score, x),
                implicit_score_matching(model, x),
            ]
        return jnp.exp(gmm.log_prob(x)) * jnp.stack(values)

    total = np.sum(np.asarray(integrands(grid)), axis=0) * (axis[1] - axis[0]) ** 2
    fisher, explicit, implicit = total[0], total[1::2], total[2::2]
    np.testing.assert_allclose(explicit, implicit + fisher, rtol=1e-9)
    assert fisher > 1.0  # the constant is no rounding error


@pytest.mark.parametrize(
    "name", ["implicit", "sliced", "sliced, plain", "differences", "explicit"]
)
def test_minimum_on_gaussian_data_is_the_true_score(name, x64):
    """For s = A(x − b) each integrand is quadratic in x, so the 2d points MEAN ± √d √C e_i give
    its exact expectation: the gradient vanishes at A = −C⁻¹, b = MEAN.
    """
    root = np.linalg.cholesky(COVARIANCE)
    points = jnp.asarray(MEAN + np.sqrt(2.0) * np.concatenate([root.T, -root.T]))
    precision = np.linalg.inv(COVARIANCE)
    truth = lambda x: -jnp.asarray(precision) @ (x - MEAN)  # noqa: E731
    signs = jnp.asarray(SIGNS)
    objective = {
        "implicit": implicit_score_matching,
        "sliced": lambda s, x: sliced_score_matching(s, x, signs),
        "sliced, plain": lambda s, x: sliced_score_matching(s, x, signs, variance_reduced=False),
        "differences": lambda s, x: finite_difference_score_matching(s, x, signs, step_size=1.0),
        "explicit": lambda s, x: explicit_score_matching(s, truth, x),
    }[name]

    @jax.jit
    def loss_and_gradient(matrix, centre):
        loss = lambda matrix, centre: jnp.mean(  # noqa: E731
            jax.vmap(lambda x: objective(lambda x: matrix @ (x - centre), x))(points)
        )
        return jax.value_and_grad(loss, argnums=(0, 1))(matrix, centre)

    least, gradient = loss_and_gradient(-precision, MEAN)
    for leaf in gradient:
        np.testing.assert_allclose(leaf, 0.0, atol=1e-13)
    # −½ tr C⁻¹ is the implicit objective's least value, 0 the explicit one's
    want = 0.0 if name == "explicit" else -0.5 * np.trace(precision)
    np.testing.assert_allclose(least, want, atol=1e-12)
    for factor in (-1.0, 0.5, 2.0):  # a sign or a ½ gone wrong would move the minimum here
        higher, gradient = loss_and_gradient(-factor * precision, MEAN)
        assert higher > least + 0.1 and np.max(np.abs(gradient[0])) > 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_minimum_over_an_sde_is_the_score_of_the_marginals(name, x64):
    """On Gaussian data, for s = factor · (A-scaled exact score): the mean gradient is within 5
    standard errors of 0 at the truth, and more than 20 away at half of it.
    """
    sde = VP(t0=1e-3)
    gmm = GaussianMixture(np.ones(1), MEAN[None], COVARIANCE[None])

    truth = {"true_score": exact_score(gmm, sde)} if name == "esm" else {}

    def model(params, x, t):
        matrix, centre = params
        law = marginal(gmm, sde, t)
        return -matrix @ jnp.linalg.inv(law.covariances[0]) @ (x - sde.alpha(t) * centre)

    @jax.jit
    def gradients(params, keys):
        def one(key):
            data_key, loss_key = jax.random.split(key)
            x0 = jax.vmap(gmm.sample)(jax.random.split(data_key, 64))
            fit = lambda params: LOSSES[name](  # noqa: E731
                loss_key, Partial(model, params), sde, x0, **truth
            )
            matrix, centre = jax.grad(fit)(params)
            return jnp.concatenate([matrix.ravel(), centre])

        return jax.vmap(one)(keys)

    split = lambda: jax.random.split(jax.random.key(3), 400)  # noqa: E731
    within(gradients((jnp.eye(2), jnp.asarray(MEAN)), split()), 0.0)
    half = np.asarray(gradients((0.5 * jnp.eye(2), jnp.asarray(MEAN)), split()))
    diagonal = half[:, [0, 3]]
    assert np.all(np.abs(diagonal.mean(0)) > 20.0 * diagonal.std(0) / np.sqrt(400))


@losses
def test_a_loss_is_linear_in_its_weight(loss):
    x0 = jnp.asarray(np.random.default_rng(2).normal(size=(8, 2)), jnp.float32)
    run = lambda weight: jax.jit(  # noqa: E731
        lambda key: loss(key, bent, VP(), x0, weight=weight)
    )(jax.random.key(8))
    tripled = run(lambda sde, t: 3.0 * noise_weight(sde, t))
    np.testing.assert_allclose(tripled, 3.0 * run(noise_weight), rtol=1e-5)  # float32


def test_labels_reach_the_score_with_their_example(x64):
    """For data that sit at their class's mean, the conditional score −(x − alpha m_c)/sigma² makes
    the loss exactly 0; a label that belongs to a neighbour does not.
    """
    sde, means = VP(), jnp.asarray([[1.0, 2.0], [-1.0, 0.5], [3.0, -2.0]])
    labels = jnp.array([2, 0, 1, 1, 0, 2])
    x0 = means[labels]

    def score(x, t, label):
        return -(x - sde.alpha(t) * means[label]) / sde.sigma(t) ** 2

    loss = jax.jit(lambda labels: dsm_loss(jax.random.key(9), score, sde, x0, context=labels))
    # (alpha m − x_t)/sigma rounds to 1e-16/sigma(t), squared
    assert loss(labels) < 1e-20
    assert loss(jnp.roll(labels, 1)) > 0.1


@losses
def test_examples_do_not_see_their_neighbours(loss, x64):
    """d loss/d context_i is example i's own contribution: another neighbour or a smaller batch
    changes none, bit for bit but for the mean's 1/B.
    """
    x0 = jnp.asarray(np.random.default_rng(3).normal(size=(8, 2)))

    def contributions(x0):
        scaled = lambda x, t, c: c["scale"] * bent(x, t)  # noqa: E731
        total = lambda c: loss(jax.random.key(10), scaled, VP(), x0, context=c)  # noqa: E731
        return jax.grad(total)({"scale": jnp.ones(len(x0))})["scale"]

    contributions = jax.jit(contributions)
    whole, other = np.asarray(contributions(x0)), np.asarray(contributions(x0.at[0].add(1.0)))
    np.testing.assert_array_equal(other[1:], whole[1:])
    assert other[0] != whole[0] and len(set(whole.tolist())) == 8
    np.testing.assert_allclose(contributions(x0[:4]) * 4, whole[:4] * 8, rtol=1e-6)


@losses
def test_dropout_keys_reach_the_score(loss):
    """One key for each example: the same keys repeat the loss, others change it."""
    x0 = jnp.ones((4, 2))

    def score(x, t, key):
        return linear(x, t) * jax.random.bernoulli(key, 0.5, x.shape)

    def run(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        return float(loss(jax.random.key(11), score, VP(), x0, context=keys))

    assert run(0) == run(0) != run(1)


@losses
def test_new_parameters_and_sdes_do_not_retrace(loss):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(key, scale, sde, x0):
        return loss(key, lambda x, t: scale * linear(x, t), sde, x0)

    pairs = ((jnp.float32(1.0), VP()), (jnp.float32(2.0), VP(beta_max=10.0)))
    first, second = (float(run(jax.random.key(13), *pair, jnp.ones((4, 2)))) for pair in pairs)
    assert first != second


@losses
def test_data_that_a_traced_function_closes_over(loss):
    """Constants of a jitted loss are checked while tracing, and found good."""
    x0 = np.ones((4, 2), np.float32)
    inside = jax.jit(lambda key: loss(key, linear, VP(), x0))(jax.random.key(14))
    outside = loss(jax.random.key(14), linear, VP(), jnp.asarray(x0))
    # float32, fused otherwise; a finite difference loses three digits of it
    np.testing.assert_allclose(inside, outside, rtol=1e-3 if loss is fdsm_loss else 1e-5)
    with pytest.raises(ValueError, match="`x0` must be finite"):
        jax.jit(lambda key: loss(key, linear, VP(), x0 * np.inf))(jax.random.key(14))


def run(loss, x0=np.ones((4, 2), np.float32), score=linear, key=None, **options):  # noqa: B008
    return loss(jax.random.key(0) if key is None else key, score, VP(), x0, **options)


BAD = {
    "raw key": ({"key": jax.random.PRNGKey(0)}, "`key` must be a typed key; got uint32"),
    "integers": ({"x0": np.ones((4, 2), int)}, "`x0` must be floating point; got int"),
    "nan": ({"x0": np.full((4, 2), np.nan)}, "`x0` must be finite; 8 of its 8 values are nan"),
    "empty": ({"x0": np.ones((0, 2))}, r"`x0` must not be empty; got shape \(0, 2\)"),
    "one number": ({"x0": np.ones(())}, r"`x0` must be a batch of examples; got shape \(\)"),
    "context": (
        {"context": np.ones(3), "score": lambda x, t, c: x},
        r"`context` must have shape \(4,\); got \(3,\). Each leaf needs the batch axis",
    ),
    "scalar context": (
        {"context": 1.0, "score": lambda x, t, c: x},
        r"`context` must have shape \(4,\); got \(\)",
    ),
    "batched network": (
        {"score": lambda x, t: x[:, :1]},
        r"`score_fn` failed on one example.*\n.*x of shape \(2,\).*net\(x\[None\], t\[None\]\)",
    ),
    "wrong shape": (
        {"score": lambda x, t: x[None]},
        r"must return the shape of `x`; got \(1, 2\) for x of shape \(2,\)",
    ),
    "weight": ({"weight": lambda sde, t: np.ones(2)}, r"`weight` must return a scalar; got shape"),
}


@pytest.mark.parametrize(("changes", "match"), BAD.values(), ids=BAD)
def test_bad_input(changes, match):
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=match):
            run(loss, **changes)


BAD_ALONE = {
    "integers": (lambda: implicit_score_matching(linear, jnp.arange(2)), "`x` must be floating"),
    "nan": (lambda: implicit_score_matching(linear, jnp.array([0.0, jnp.nan])), "1 of its 2"),
    "true score": (
        lambda: explicit_score_matching(linear, lambda x: x[None], jnp.ones(2)),
        r"`true_score` must return the shape of `x`; got \(1, 2\)",
    ),
    "probes": (
        lambda: sliced_score_matching(linear, jnp.ones(2), jnp.ones((1, 3))),
        r"`probes` must have shape \(2,\); got \(3,\)",
    ),
    "late": (
        lambda: denoising_score_matching(jax.random.key(0), linear, VP(), jnp.ones(2), 2.0),
        r"`t` must lie in \[t0, t1\] = \[1e-05, 1.0\] of VP; got 2.0",
    ),
    "no projections": (
        lambda: run(ssm_loss, num_projections=0),
        "`num_projections`.*at least 1; got 0",
    ),
}


@pytest.mark.parametrize(("attempt", "match"), BAD_ALONE.values(), ids=BAD_ALONE)
def test_bad_input_to_the_parts(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
