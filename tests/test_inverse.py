"""Inverse problems: operators against dense matrices, guidance and particles against the closed
form.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from jax.tree_util import Partial
from scipy.stats import multivariate_normal, norm
from test_sampling import OTHERS, SAMPLERS, component_moments, expected_moments, oracle
from test_sde import within

import sde_score as ss
from sde_score._checks import ArgumentError
from sde_score.inverse import _resample

KERNEL = np.array([[0.1, 0.2, 0.0], [0.3, 0.25, 0.15]])
MASK = np.array([[True, False, False], [False, True, True]])


OPERATORS = {  # of each kind, on vectors and on images
    "mask": lambda: ss.mask_operator(MASK),
    "random projection": lambda: ss.random_projection(jax.random.key(0), (2, 3), 4),
    "grey": lambda: ss.grey_operator((4, 2, 3)),
    "downsampling": lambda: ss.downsampling_operator((4, 6, 2), 2),
    "downsampled vector": lambda: ss.downsampling_operator((6,), 3),
    "blur": lambda: ss.blur_operator((4, 5, 2), KERNEL),
    "blurred vector": lambda: ss.blur_operator((7,), KERNEL[1]),
    "any": lambda: ss.with_singular_values(
        ss.linear_operator(lambda x: jnp.stack([x[0] - 2 * x[1], x[2] + x[0]]), (3,))
    ),
    "rank one": lambda: ss.with_singular_values(
        ss.linear_operator(lambda x: jnp.stack([x[0] - x[1], 2 * x[1] - 2 * x[0]]), (2,))
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_and_singular_values(name, x64):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩; Uᵀ is orthogonal and takes A Aᵀ to the squared singular values; and
    the log-density is that of a dense Gaussian.
    """
    operator, rng = OPERATORS[name](), np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s)) for s in (operator.like.shape, operator.data_shape))

    @jax.jit
    def evaluate(operator, x, y):
        flat = lambda fn, like: jax.jacfwd(fn)(like).reshape(-1, like.size)
        squares = jnp.broadcast_to(operator.singular_values**2, operator.rotate(y).shape)
        back, log_prob = operator.adjoint(y), operator.log_prob(y, 0.7, 0.3)
        return (
            *(operator(x), back, flat(operator, x), flat(operator.rotate, y)),
            *(squares.ravel(), log_prob),
        )

    image, back, a, u, squares, log_prob = map(np.asarray, evaluate(operator, x, y))
    np.testing.assert_allclose(np.vdot(image, y), np.vdot(x, back))
    np.testing.assert_allclose(u @ u.T, np.eye(y.size), atol=1e-12)
    np.testing.assert_allclose(u @ a @ a.T @ u.T, np.diag(squares), atol=1e-7)  # of a root of 0
    covariance = 0.7**2 * a @ a.T + 0.3**2 * np.eye(y.size)
    want = multivariate_normal(np.zeros(y.size), covariance).logpdf(np.ravel(y))
    np.testing.assert_allclose(log_prob, want, rtol=1e-10)


def test_operators_do_what_they_say(x64):
    """Against numpy, by loops where it has no such function."""
    mask, grey, down, blur = (
        OPERATORS[name]() for name in ("mask", "grey", "downsampling", "blur")
    )
    draw = lambda operator: np.random.default_rng(1).normal(size=operator.like.shape)
    np.testing.assert_array_equal(mask(draw(mask)), draw(mask)[MASK])
    np.testing.assert_allclose(grey(draw(grey)), draw(grey).mean(-1))
    blocks = draw(down).reshape(2, 2, 3, 2, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(down(draw(down)), blocks)
    blurred = np.zeros((4, 5, 2))
    for i, j in np.ndindex(2, 3):  # kernel[i, j] weighs x at the distance (i − 1, j − 1)
        blurred += KERNEL[i, j] * np.roll(draw(blur), (i - 1, j - 1), (0, 1))
    np.testing.assert_allclose(blur(draw(blur)), blurred, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "sde"),
    [("mask", ss.SubVP()), ("blurred vector", ss.VE(sigma_max=5.0)), ("any", ss.VP())],
)
def test_pgdm_is_exact_on_an_isotropic_gaussian(name, sde, x64):
    """Where x_0 ~ N(0, c² I), its score is that of the posterior at every time, to 1e-8, noise or
    none; with another sigma_data it is not.
    """
    operator, c, t = OPERATORS[name](), 0.7, 0.4
    d, shape = operator.like.size, operator.like.shape
    flat = lambda x: operator(x.reshape(shape)).ravel()
    gmm = ss.GaussianMixture(np.ones(1), np.zeros((1, d)), c**2 * np.eye(d)[None])
    y, x = (jnp.asarray(np.random.default_rng(2).normal(size=n)) for n in (flat(gmm.mean).size, d))
    plain = ss.exact_score(gmm, sde)
    score = lambda x, t: plain(x.ravel(), t).reshape(shape)

    @jax.jit
    def evaluate(noise):
        data = y.reshape(operator.data_shape)
        guided = [
            ss.pgdm(score, sde, operator, data, noise=noise, sigma_data=c)(x.reshape(shape), t)
            for c in (c, 0.9)
        ]
        return *guided, ss.exact_score(gmm.posterior(flat, y, noise), sde)(x, t).reshape(shape)

    for noise in (0.2, 0.0):
        guided, other, want = evaluate(noise)
        np.testing.assert_allclose(guided, want, rtol=1e-8, atol=1e-10)
        assert np.max(np.abs(other - want)) > 1e-3


def test_dps_follows_its_formula(x64):
    """s − (scale/‖r‖) ∂‖y − A x̂_0(x)‖²/∂x by finite differences of x̂_0 from the oracle; finite
    where r = 0.
    """
    gmm, sde, operator, t = oracle(), ss.VP(), ss.linear_operator(lambda x: 2 * x[:1], (2,)), 0.3
    x, y = jnp.array([0.4, -0.7]), jnp.array([1.3])
    score = ss.exact_score(gmm, sde)
    x0 = jax.jit(lambda x: ss.posterior_mean(gmm, sde, x, t))
    distance = lambda x: float(jnp.sum((y - 2 * x0(x)[:1]) ** 2))
    slope = np.array([(distance(x + h) - distance(x - h)) / 2e-5 for h in 1e-5 * np.eye(2)])
    want = score(x, t) - 0.6 / np.sqrt(distance(x)) * slope
    guided = ss.dps(score, sde, operator, y, scale=0.6)(x, t)
    np.testing.assert_allclose(guided, want, rtol=1e-7)  # central differences
    exact = ss.dps(score, sde, operator, 2 * ss.denoise(score, sde, x, t)[:1], scale=0.6)
    np.testing.assert_allclose(exact(x, t), score(x, t), rtol=1e-12)


def problem():
    """The oracle seen along one direction: its posterior has two modes."""
    operator = ss.with_singular_values(ss.linear_operator(lambda x: x[:1] - 0.5 * x[1:], (2,)))
    return operator, jnp.array([1.2])


@functools.cache
def posterior_draws(sampler, count):
    sde = ss.VP(t0=1e-2, t1=0.6)
    posterior = oracle().posterior(*problem(), 1.0)

    @jax.jit
    def draw(posterior, key):
        start_key, noise_key = jax.random.split(key)
        init = ss.marginal(posterior, sde, sde.t1).sample(start_key)
        return (SAMPLERS | OTHERS)[sampler](noise_key, ss.exact_score(posterior, sde), sde, init)

    keys = jax.random.split(jax.random.key(0), count)
    return ss.marginal(posterior, sde, sde.t0), jax.jit(jax.vmap(draw, (None, 0)))(posterior, keys)


@pytest.mark.diffrax_keys
@pytest.mark.parametrize(
    ("sampler", "count"),
    [
        ("heun", 4_000),
        *(pytest.param(name, 20_000, marks=pytest.mark.slow) for name in SAMPLERS | OTHERS),
    ],
)
def test_the_exact_conditional_score_gives_the_posterior(sampler, count):
    """Weights, means and covariances of its components within 5 standard errors; under VP, with
    the steps that make every sampler's bias small in test_sampling.
    """
    law, x = posterior_draws(sampler, count)
    assert float(jnp.sum(jnp.sort(law.weights)[:-1])) > 0.2  # no single mode
    within(jax.vmap(lambda x: component_moments(law, x))(x), expected_moments(law))


@functools.cache
def particle_errors(num_particles, repeats=32):
    """Of repeated runs: errors of the posterior mean and weights [repeats, 5], and the ratios of
    the estimated to the true p(y) [repeats].
    """
    gmm, (operator, y), sde = oracle(), problem(), ss.VP(t0=1e-3)
    score, ts = ss.exact_score(gmm, sde), ss.uniform_grid(sde, 80)
    options = {"noise": 0.5, "num_particles": num_particles, "ts": ts, "sigma_data": 2.0}
    run = lambda key: ss.twisted_smc(key, score, sde, operator, y, **options)
    keys = jax.random.split(jax.random.key(num_particles), repeats)
    particles = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
    np.testing.assert_allclose(particles.weights.sum(1), 1.0, rtol=1e-5)
    effective = np.asarray(particles.effective)
    assert effective.shape == (repeats, 80) and effective.min() >= 1
    assert effective.max() <= 1.001 * num_particles
    np.testing.assert_allclose(effective[:, -1] * (particles.weights**2).sum(1), 1.0, rtol=1e-4)
    posterior = gmm.posterior(operator, y, 0.5)
    features = jax.vmap(jax.vmap(lambda x: jnp.concatenate([x, gmm.responsibilities(x)])))
    got = jnp.einsum("rn,rnf->rf", particles.weights, features(particles.x))
    errors = got - jnp.concatenate([posterior.mean, posterior.weights])[None]
    a = np.array([1.0, -0.5])
    deviation = np.sqrt(np.einsum("i,kij,j->k", a, gmm.covariances, a) + 0.5**2)
    density = norm.pdf(y, gmm.means @ a, deviation) @ gmm.weights
    return np.asarray(errors), np.exp(particles.log_evidence) / density


def test_particles_converge_to_the_posterior():
    """The spread of the errors falls like 1/√n: 16 times the particles, a quarter (within a factor
    of 2, from 32 repeats of heavy-tailed weights); with many none is biased by more than 5
    standard errors and 0.05, three times what the steps left in 48 runs of 120; and the estimate
    of p(y) is right within 5 standard errors and 3 %.
    """
    (few, _), (many, evidence) = particle_errors(64), particle_errors(1024)
    ratio = np.sqrt(few.var(0).mean() / many.var(0).mean())
    assert 2.0 < ratio < 8.0
    assert np.all(np.abs(many.mean(0)) < 0.05 + 5 * many.std(0) / np.sqrt(len(many)))
    assert abs(evidence.mean() - 1) < 0.03 + 5 * evidence.std() / np.sqrt(len(evidence))


def test_particles_are_resampled_where_few_are_worth_anything():
    """Weights of 0.9 and 1/30 thrice make three or four copies, of equal weight; nearly equal ones
    stay as they are.
    """
    log_weights = jnp.log(jnp.array([1 / 30, 0.9, 1 / 30, 1 / 30]))
    for seed in range(5):
        chosen, after = _resample(jax.random.key(seed), jnp.arange(4), log_weights)
        assert np.sum(np.asarray(chosen) == 1) in (3, 4)
        np.testing.assert_allclose(after, -np.log(4.0), rtol=1e-6)
    even = jnp.log(jnp.array([0.2, 0.3, 0.2, 0.3]))
    chosen, after = _resample(jax.random.key(5), jnp.arange(4), even)
    assert np.array_equal(chosen, np.arange(4)) and np.array_equal(after, even)


@pytest.mark.parametrize("sde", [ss.SubVP(), ss.VE(sigma_max=5.0)])
def test_unguided_particles_are_exact_on_an_isotropic_gaussian(sde):
    """In 4 steps: the variance of x̂_0 is c² (1 − r²/c²) by the last step's r², at 20,000
    particles, all of nearly the same weight.
    """
    c, line = 1.5, ss.with_singular_values(LINE)
    score = lambda x, t: -x / (c**2 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
    options = {"noise": 1e3, "num_particles": 20_000, "sigma_data": c}
    ts = ss.log_snr_grid(sde, 4)
    run = jax.jit(
        lambda key: ss.twisted_smc(key, score, sde, line, jnp.zeros(1), **options, ts=ts)
    )
    particles = run(jax.random.key(0))
    assert particles.effective.min() > 19_000
    a, sigma = sde.alpha(ts[-1]), sde.sigma(ts[-1])
    within(particles.x**2, jnp.full(2, c**4 * a**2 / (c**2 * a**2 + sigma**2)))


def test_pgdm_of_a_blur_whose_zeros_are_rounded():
    """In float32, where it would divide by their rounding errors: exact on a Gaussian."""
    operator, x = ss.blur_operator((15,), np.ones(5, np.float32) / 5), jnp.cos(jnp.arange(15.0))
    dense = ss.with_singular_values(ss.linear_operator(operator, (15,)))
    gmm = ss.GaussianMixture(np.ones(1), np.zeros((1, 15)), np.eye(15)[None])
    score, y = ss.exact_score(gmm, VP), operator(jnp.sin(jnp.arange(15.0)))
    blurred, wanted = (ss.pgdm(score, VP, o, y, noise=0.0)(x, 0.05) for o in (operator, dense))
    np.testing.assert_allclose(blurred, wanted, atol=2e-3 * float(jnp.max(jnp.abs(wanted))))


def test_a_sharp_posterior_keeps_its_digits():
    """Seen with noise of 1e-3, in float32: the deviation along the observed direction to 1 %."""
    gmm = ss.GaussianMixture(*mixture(np.float32))
    direction = jnp.array([0.6, 0.8])
    posterior = gmm.posterior(lambda x: x[:1] * 0.6 + x[1:] * 0.8, jnp.array([0.7]), 1e-3)
    whitened = jax.vmap(jnp.matmul)(
        jnp.swapaxes(posterior.spectrum.vectors, 1, 2), jnp.tile(direction, (3, 1))
    )
    variance = 1.0 / jnp.sum(whitened**2 / posterior.spectrum.values, axis=1)
    np.testing.assert_allclose(jnp.sqrt(variance), 1e-3, rtol=1e-2)


def test_operators_take_what_converts_to_an_array():
    blur = ss.blur_operator((4,), np.array([0.5, 0.5]))
    want = blur(jnp.arange(4.0))
    np.testing.assert_array_equal(blur([0, 1, 2, 3]), want)
    np.testing.assert_array_equal(blur(jnp.arange(4)), want)
    np.testing.assert_allclose(blur.adjoint(np.arange(4)), blur.adjoint(jnp.arange(4.0)))
    assert ss.mask_operator([True, False]).data_shape == (1,)


LINE = ss.linear_operator(lambda x: x[:1], (2,))
SCORE, VP = Partial(lambda x, t: -x), ss.VP()
BAD = {
    "data": (
        lambda: ss.pgdm(SCORE, VP, LINE, jnp.ones(3), noise=0.1),
        r"`y` must have shape \(1,\); got \(3,\)",
    ),
    "state": (
        lambda: ss.dps(SCORE, VP, LINE, jnp.ones(1), scale=1.0)(jnp.ones(3), 0.5),
        r"`x` must have shape \(2,\); got \(3,\)",
    ),
    "nan": (
        lambda: ss.dps(SCORE, VP, LINE, jnp.array([jnp.nan]), scale=1.0),
        "`y` must be finite",
    ),
    "adjoint": (lambda: LINE.adjoint(jnp.ones(2)), r"`y` must have shape \(1,\); got \(2,\)"),
    "batch": (lambda: LINE(jnp.ones((5, 2))), r"`x` must have shape \(2,\).*vmap"),
    "operator": (
        lambda: ss.pgdm(SCORE, VP, lambda x: x, jnp.ones(2), noise=0.1),
        "`operator` must be a LinearOperator",
    ),
    "negative noise": (
        lambda: ss.pgdm(SCORE, VP, LINE, jnp.ones(1), noise=-0.1),
        "`noise` must be finite and at least 0; got -0.1",
    ),
    "particles without noise": (
        lambda: ss.twisted_smc(
            jax.random.key(0), SCORE, VP, LINE, jnp.ones(1), noise=0.0, num_particles=2
        ),
        "`noise` must be finite and above 0",
    ),
    "no singular values": (
        lambda: ss.pgdm(SCORE, VP, LINE, jnp.ones(1), noise=0.1)(jnp.ones(2), 0.5),
        r"has no singular values.*with_singular_values\(operator\)",
    ),
    "grid": (
        lambda: ss.twisted_smc(
            *(jax.random.key(0), SCORE, VP, LINE, jnp.ones(1)),
            **{"noise": 0.1, "num_particles": 2, "ts": jnp.linspace(0.5, VP.t0, 5)},
        ),
        r"`ts\[0\]` must be t1 = 1.0; got 0.5. The particles start at the prior",
    ),
    "sigma_data": (
        lambda: ss.twisted_smc(
            *(jax.random.key(0), SCORE, VP, LINE, jnp.ones(1)),
            **{"noise": 0.1, "num_particles": 2, "sigma_data": -1.0},
        ),
        "`sigma_data` must be finite and above 0",
    ),
    "class of an SDE": (
        lambda: ss.dps(SCORE, ss.VP, LINE, jnp.ones(1), scale=1.0),
        "`sde` must be an SDE.*Pass an instance",
    ),
    "affine": (lambda: ss.linear_operator(lambda x: x + 1.0, (2,)), "`operator` must be linear"),
    "square": (lambda: ss.linear_operator(lambda x: x**2, (2,)), "`operator` must be linear"),
    "matrix": (
        lambda: ss.linear_operator(np.eye(2), (2,)),
        "`operator` must be a function of one example.*lambda x: matrix @ x",
    ),
    "affine posterior": (
        lambda: oracle().posterior(lambda x: x[:1] + 5.0, jnp.ones(1), 0.1),
        "`operator` must be linear",
    ),
    "nan posterior": (
        lambda: oracle().posterior(lambda x: x[:1], jnp.array([jnp.nan]), 0.1),
        "`y` must be finite",
    ),
    "singular posterior": (
        lambda: oracle().posterior(lambda x: jnp.stack([x[0], x[0]]), jnp.ones(2), 0.0),
        "`noise` must be above 0 where A C Aᵀ is singular; got 0.0",
    ),
    "mask of numbers": (lambda: ss.mask_operator(MASK * 1), "`mask` must be Boolean; got int"),
    "empty mask": (lambda: ss.mask_operator(MASK & False), "`mask` must be true somewhere"),
    "traced mask": (lambda: jax.jit(ss.mask_operator)(MASK), "known when tracing"),
    "factor": (lambda: ss.downsampling_operator((6, 5), 3), "`factor` must divide.*got 3 for"),
    "kernel": (
        lambda: ss.blur_operator((2,), np.ones(3)),
        r"`kernel` must fit into `shape`, \(2,",
    ),
    "kernel's axes": (lambda: ss.blur_operator((2,), np.ones((1, 1))), "`kernel` must fit into"),
    "directions": (
        lambda: ss.random_projection(jax.random.key(0), (2, 2), 5),
        "`num` must be at most the size 4 of x; got 5",
    ),
    "shape": (lambda: ss.grey_operator((2, 0)), "`shape` must be a tuple of positive integers"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ArgumentError, match=match):
        attempt()
