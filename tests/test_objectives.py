"""Every objective against the others, against central differences and at its minimum; the losses
that are neither plain denoising nor plain slicing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from test_losses import COVARIANCE, LOSSES, MEAN, SIGNS, bent, linear
from test_sde import sdes, within

from sde_score import (
    VP,
    GaussianMixture,
    dsm_loss,
    edm_loss,
    esm_loss,
    exact_score,
    explicit_score_matching,
    fdsm_loss,
    finite_difference_score_matching,
    gaussian_probes,
    grid_times,
    hutchinson_divergence,
    implicit_score_matching,
    ism_loss,
    likelihood_times,
    likelihood_weight,
    lognormal_times,
    loss_floor,
    marginal,
    perturb,
    precondition,
    rademacher_probes,
    single_sigma_score_matching,
    sliced_score_matching,
    sphere_probes,
    ssm_loss,
)


def network(params, x, *time):
    return jnp.tanh(params[0] @ x + sum(time)) @ params[1] - 0.1 * x**3


def energy_score(params, x, *time):
    """A score that is a gradient: the objectives differentiate it once more."""
    energy = lambda x: jnp.sum(jnp.tanh(params[0] @ x + sum(time)) * params[1, 0]) + x @ x  # noqa: E731
    return -jax.grad(energy)(x)


PROBES = np.random.default_rng(6).normal(size=(2, 2))
ALONE = {
    "explicit": lambda key, s, x: explicit_score_matching(s, lambda x: -x, x),
    "implicit": lambda key, s, x: implicit_score_matching(s, x),
    "sliced": lambda key, s, x: sliced_score_matching(s, x, jnp.asarray(PROBES)),
    "sliced, plain": lambda key, s, x: sliced_score_matching(
        s, x, jnp.asarray(PROBES), variance_reduced=False
    ),
    "differences": lambda key, s, x: finite_difference_score_matching(s, x, jnp.asarray(PROBES)),
    "single sigma": lambda key, s, x: single_sigma_score_matching(key, s, x, sigma=0.3),
}
OVER_SDE = {
    **LOSSES,
    "ssm, plain": partial(ssm_loss, variance_reduced=False, num_projections=2),
    "edm": partial(edm_loss, sigma_data=0.7),
    "likelihood": partial(dsm_loss, weight=likelihood_weight, times=likelihood_times),
}


@pytest.mark.parametrize(
    ("model", "name"),
    [(network, name) for name in [*ALONE, *OVER_SDE]] + [(energy_score, name) for name in ALONE],
)
def test_gradient_against_central_differences(name, model, x64):
    """Differences of fourth order at h = 1e-3: truncation 1e-12, rounding 1e-13 (1e-8 for finite
    differences of finite differences).
    """
    x0 = jnp.asarray(np.random.default_rng(4).normal(size=(8, 2)))

    def loss(params):
        score = partial(model, params)
        if name in OVER_SDE:
            return OVER_SDE[name](jax.random.key(12), score, VP(), x0)
        keys = jax.random.split(jax.random.key(12), len(x0))
        return jnp.mean(jax.vmap(lambda key, x: ALONE[name](key, score, x))(keys, x0))

    params = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2, 2)))
    directions = jnp.eye(params.size).reshape(-1, *params.shape)

    @jax.jit
    def both(params):
        move = lambda h: jax.vmap(lambda v: loss(params + h * v))(directions)  # noqa: E731
        near, far = (move(h) - move(-h) for h in (1e-3, 2e-3))
        return jax.grad(loss)(params).ravel(), (8.0 * near - far) / 12e-3

    gradient, finite = (np.asarray(part) for part in both(params))
    error = np.linalg.norm(gradient - finite) / np.linalg.norm(gradient)
    print(f"{name}: relative error of the gradient {error:.1e}")
    assert error <= 1e-6
    assert np.linalg.norm(gradient) > 0.1


@sdes
def test_objectives_differ_by_closed_form_constants(sde, x64):
    """On Gaussian data at three times: ESM − ISM = ½ E_t[weight tr C_t⁻¹], DSM − ISM = ½
    E_t[weight d/sigma²], SSM − ISM = FDSM − ISM = 0, for a nonlinear score; paired, from one key.
    """
    gmm = GaussianMixture(np.ones(1), MEAN[None], COVARIANCE[None])
    ts = jnp.asarray([0.2, 0.5, 0.9]) * (sde.t1 - sde.t0) + sde.t0
    scaled = lambda x, t: bent(x / (1.0 + sde.sigma(t)), t) / (1.0 + sde.sigma(t))  # noqa: E731

    @jax.jit
    @jax.vmap
    def draw(key):
        data_key, loss_key = jax.random.split(key)
        x0 = jax.vmap(gmm.sample)(jax.random.split(data_key, 32))
        run = lambda loss, **options: loss(  # noqa: E731
            loss_key, scaled, sde, x0, times=grid_times(ts), **options
        )
        implicit = run(ism_loss)
        return jnp.stack(
            [
                run(esm_loss, true_score=exact_score(gmm, sde)) - implicit,
                run(dsm_loss) - implicit,
                run(ssm_loss, num_projections=2) - implicit,
                run(ssm_loss, variance_reduced=False, probes=sphere_probes) - implicit,
                run(fdsm_loss, probes=gaussian_probes) - implicit,
            ]
        )

    traces = [np.trace(np.linalg.inv(marginal(gmm, sde, t).covariances[0])) for t in ts]
    variances = np.asarray(jax.vmap(sde.sigma)(ts)) ** 2
    want = np.array([0.5 * np.mean(variances * traces), 1.0, 0.0, 0.0, 0.0])
    with jax.debug_key_reuse(False):  # common random numbers are the point
        within(draw(jax.random.split(jax.random.key(0), 2_000)), want)


def test_single_sigma_has_its_minimum_at_the_score_of_the_noised_density(x64):
    """On Gaussian data s = −A (x − b): the mean gradient is within 5 standard errors of 0 at A =
    (C + sigma²)⁻¹, b = MEAN, and more than 20 away at the clean density's A = C⁻¹.
    """
    sigma, gmm = 0.5, GaussianMixture(np.ones(1), MEAN[None], COVARIANCE[None])
    noised = np.linalg.inv(COVARIANCE + sigma**2 * np.eye(2))

    def gradient(matrix, key):
        data_key, noise_key = jax.random.split(key)
        x = gmm.sample(data_key)
        loss = lambda matrix, centre: single_sigma_score_matching(  # noqa: E731
            noise_key, lambda x: -matrix @ (x - centre), x, sigma=sigma
        )
        matrix, centre = jax.grad(loss, argnums=(0, 1))(matrix, jnp.asarray(MEAN))
        return jnp.concatenate([matrix.ravel(), centre])

    draw = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))
    split = lambda: jax.random.split(jax.random.key(0), 20_000)  # noqa: E731
    within(draw(noised, split()), 0.0)
    clean = np.asarray(draw(np.linalg.inv(COVARIANCE), split()))[:, [0, 3]]
    assert np.all(np.abs(clean.mean(0)) > 20.0 * clean.std(0) / np.sqrt(20_000))


def test_finite_differences_err_by_the_square_of_the_step(x64):
    """In vᵀ(∂s/∂x)v + ½‖s‖²; a linear score meets it with any step."""
    x, signs = jnp.asarray([0.7, -1.2]), jnp.asarray(SIGNS)
    exact = implicit_score_matching(bent, x)
    errors = np.array(
        [
            finite_difference_score_matching(bent, x, signs, step_size=h) - exact
            for h in (0.1, 0.05, 0.025)
        ]
    )
    np.testing.assert_allclose(np.log2(np.abs(errors[:-1] / errors[1:])), 2.0, atol=0.05)
    big = finite_difference_score_matching(linear, x, signs, step_size=3.0)
    np.testing.assert_allclose(big, sliced_score_matching(linear, x, signs), rtol=1e-13)


def test_finite_differences_in_single_precision():
    """The default step rounds by less than a thousandth of the value."""
    x, signs = jnp.asarray([0.7, -1.2]), jnp.asarray(SIGNS)
    got = finite_difference_score_matching(bent, x, signs)
    np.testing.assert_allclose(got, implicit_score_matching(bent, x), rtol=1e-3)


@sdes
def test_edm_loss_is_the_weighted_error_of_the_denoiser(sde, x64):
    """λ ‖D − x_0‖² with λ = (s² + sd²)/(s sd)², D from `precondition`, s = sigma/alpha."""
    x0, sigma_data = jnp.asarray([[0.4, -0.8]]), 0.6
    loss = edm_loss(jax.random.key(3), bent, sde, x0, sigma_data=sigma_data)
    time_key, example_key = jax.random.split(jax.random.key(3))
    t = lognormal_times()(time_key, sde, 1)[0][0]
    x_t, _ = perturb(jax.random.split(example_key, 1)[0], sde, x0[0], t)
    error = precondition(sde, bent, sigma_data=sigma_data)(x_t, t) - x0[0]
    level = sde.sigma(t) / sde.alpha(t)
    weight = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
    np.testing.assert_allclose(loss, weight * jnp.sum(error**2), rtol=1e-9)


@sdes
def test_edm_loss_has_its_minimum_at_the_denoiser(sde, x64):
    """For N(0, sd² I) the best F is 0, as the best denoiser is c_skip x; the loss there is d. The
    gradient with respect to a scale and a shift is within 5 standard errors of 0.
    """

    def loss(params, key, sigma_data):
        data_key, loss_key = jax.random.split(key)
        net = lambda x, c_noise: params[0] * x + params[1]  # noqa: E731
        x0 = 0.5 * jax.random.normal(data_key, (16, 2))
        return edm_loss(loss_key, net, sde, x0, sigma_data=sigma_data)

    draw = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, None)))
    split = lambda: jax.random.split(jax.random.key(0), 2_000)  # noqa: E731
    value, gradient = draw(jnp.zeros(2), split(), 0.5)
    within(value, 2.0)
    within(gradient, 0.0)
    _, gradient = draw(jnp.zeros(2), split(), 0.3)  # with another sigma_data it is elsewhere
    slope = np.asarray(gradient)[:, 0]
    assert abs(slope.mean()) > 20.0 * slope.std() / np.sqrt(len(slope))


@sdes
def test_loss_floor(sde, x64):
    """For N(0, C) data the floor is ½ E_t[weight (d/sigma² − tr C_t⁻¹)]; and a model's DSM loss
    less the floor is its ESM loss.
    """
    gmm = GaussianMixture(np.ones(1), np.zeros((1, 2)), COVARIANCE[None])
    ts = jnp.linspace(sde.t0, sde.t1, 7)
    floor = loss_floor(jax.random.key(0), sde, gmm, num_samples=20_000, times=grid_times(ts))
    traces = [np.trace(np.linalg.inv(marginal(gmm, sde, t).covariances[0])) for t in ts]
    variances = np.asarray(jax.vmap(sde.sigma)(ts)) ** 2
    want = 0.5 * np.mean(variances * (2.0 / variances - traces))
    assert abs(floor.value - want) < 5.0 * floor.stderr < 0.05

    gmm = GaussianMixture(*mixture(np.float64))
    floor = loss_floor(jax.random.key(1), sde, gmm, num_samples=20_000)
    truth = exact_score(gmm, sde)
    model = lambda x, t: truth(x, t) + 0.3 / sde.sigma(t)  # noqa: E731
    x0 = jax.vmap(gmm.sample)(jax.random.split(jax.random.key(2), 20_000))
    excess = dsm_loss(jax.random.key(3), model, sde, x0) - floor.value
    explicit = esm_loss(jax.random.key(4), model, sde, x0, true_score=truth)
    np.testing.assert_allclose(explicit, 0.09, rtol=1e-10)
    assert abs(excess - explicit) < 5.0 * np.sqrt(2.0) * floor.stderr


def test_projections_and_their_number_reach_the_objective(x64):
    """From one key the sliced losses are the time-free objectives at the same noised point."""
    sde, x0, t = VP(), jnp.asarray([[0.4, -0.8]]), 0.6
    law, score = grid_times(jnp.array([t])), lambda x: bent(x, t)
    counts = []

    def probes(key, num, shape):
        """Three vectors when asked for three; the check of the law asks for more."""
        counts.append(num)
        fixed = jnp.asarray([[1.0, 1.0], [-1.0, 1.0], [0.5, -1.3]])
        return fixed if num == 3 else rademacher_probes(key, num, shape)

    _, example_key = jax.random.split(jax.random.key(3))
    x_t, _ = perturb(jax.random.split(example_key, 1)[0], sde, x0[0], t)
    run = lambda loss, **options: loss(  # noqa: E731
        jax.random.key(3), bent, sde, x0, times=law, probes=probes, num_projections=3, **options
    )
    weight, vectors = sde.sigma(t) ** 2, probes(None, 3, (2,))
    for reduced in (True, False):
        want = weight * sliced_score_matching(score, x_t, vectors, variance_reduced=reduced)
        np.testing.assert_allclose(run(ssm_loss, variance_reduced=reduced), want, rtol=1e-12)
    step = 0.5 * sde.sigma(t)
    want = weight * finite_difference_score_matching(score, x_t, vectors, step_size=step)
    np.testing.assert_allclose(run(fdsm_loss, step_size=0.5), want, rtol=1e-12)
    assert counts.count(3) == 4
    assert abs(want - weight * sliced_score_matching(score, x_t, vectors)) > 1e-3


def test_single_sigma_closed_form(x64):
    """With s = −c x at x = 0 the residual is (1 − c sigma²) z/sigma: ½ d (1 − c sigma²)²/sigma²
    in the mean.
    """
    c, sigma = 0.4, 0.5
    keys = jax.random.split(jax.random.key(0), 4_000)
    draw = lambda key: single_sigma_score_matching(  # noqa: E731
        key, lambda x: -c * x, jnp.zeros(3), sigma=sigma
    )
    within(jax.vmap(draw)(keys), 1.5 * (1.0 - c * sigma**2) ** 2 / sigma**2)


def test_finite_differences_far_from_the_origin():
    """In float32 at x = 100, 10,000 noise levels away from 0, a step that is no power of two
    rounds x ± h v and is 14 % off.
    """
    score = lambda x: (100.0 - x) / 0.01**2  # noqa: E731
    x = 100.0 + 0.01 * jax.random.normal(jax.random.key(0), (500, 2))
    signs = jnp.asarray([[1.0, -1.0]])
    differences = lambda x: finite_difference_score_matching(  # noqa: E731
        score, x, signs, step_size=4.9e-5
    )
    got, want = jax.vmap(differences)(x), jax.vmap(partial(implicit_score_matching, score))(x)
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=1e-3)


def test_the_standard_error_of_the_floor():
    """It is the spread of independent floors, to the 5 % that 200 of them tell."""
    gmm = GaussianMixture(*mixture())
    floor = lambda key: loss_floor(key, VP(), gmm, num_samples=400)  # noqa: E731
    floors = jax.jit(jax.vmap(floor))(jax.random.split(jax.random.key(5), 200))
    ratio = np.std(floors.value) / np.sqrt(np.mean(np.square(floors.stderr)))
    assert abs(ratio - 1.0) < 5.0 * 0.05


def test_sphere_probes(x64):
    v = np.asarray(sphere_probes(jax.random.key(0), 20_000, (3, 2)))
    np.testing.assert_allclose(np.sum(v**2, axis=(1, 2)), 6.0, rtol=1e-12)
    flat = v.reshape(-1, 6)
    within(flat[:, :, None] * flat[:, None, :], np.eye(6))


def unit_vectors(key, num, shape):
    """The sphere with the Gaussian's ½‖s‖²: E[v vᵀ] = I/d."""
    return sphere_probes(key, num, shape) / np.sqrt(np.prod(shape))


X, BATCH = np.array([0.3, -0.4]), np.ones((4, 2), np.float32)
UNIT = np.eye(2)
BAD = {
    "unit probes": (lambda: sliced_score_matching(linear, X, UNIT), "all 2 have norm 1.*by √d"),
    "unit probes, differences": (
        lambda: finite_difference_score_matching(linear, X, UNIT),
        r"`probes` must have E\[v vᵀ\] = I; all 2 have norm 1",
    ),
    "no probes": (
        lambda: sliced_score_matching(linear, X, np.ones((0, 2))),
        r"`len\(probes\)` must be a Python integer of at least 1; got 0",
    ),
    "no probes, divergence": (
        lambda: hutchinson_divergence(linear, X, np.ones((0, 2))),
        r"`len\(probes\)` must be a Python integer of at least 1; got 0",
    ),
    "step over an SDE": (
        lambda: fdsm_loss(jax.random.key(0), linear, VP(), BATCH, step_size=0.0),
        "`step_size` must be finite and above 0; got 0.0",
    ),
    "score with time": (
        lambda: single_sigma_score_matching(jax.random.key(0), lambda x, t: -x, X, sigma=0.5),
        r"one with time, where none is passed, with `lambda x: net\(x, t\)`",
    ),
    "unit law": (
        lambda: ssm_loss(jax.random.key(0), linear, VP(), BATCH, probes=unit_vectors),
        r"`probes` must draw v with E\[v vᵀ\] = I, hence E‖v‖² = d = 2; got E‖v‖² ≈ 1",
    ),
    "unit law, differences": (
        lambda: fdsm_loss(jax.random.key(0), linear, VP(), BATCH, probes=unit_vectors),
        "Unit vectors must be multiplied by √d, as sphere_probes does",
    ),
    "law of the wrong shape": (
        lambda: ssm_loss(
            jax.random.key(0), linear, VP(), BATCH, probes=lambda k, n, s: jnp.ones(s)
        ),
        r"`probes` must have shape \(2048, 2\); got \(2,\).*\(key, num, shape\)",
    ),
    "probes of the wrong shape": (
        lambda: finite_difference_score_matching(linear, X, np.ones((1, 3))),
        r"`probes` must have shape \(2,\); got \(3,\)",
    ),
    "step": (
        lambda: finite_difference_score_matching(linear, X, 2 * UNIT, step_size=0.0),
        "`step_size` must be finite and above 0; got 0.0",
    ),
    "no projections": (
        lambda: fdsm_loss(jax.random.key(0), linear, VP(), BATCH, num_projections=0),
        "`num_projections`.*at least 1; got 0",
    ),
    "sigma": (
        lambda: single_sigma_score_matching(jax.random.key(0), linear, X, sigma=0.0),
        "`sigma` must be finite and above 0; got 0.0",
    ),
    "nan": (
        lambda: single_sigma_score_matching(jax.random.key(0), linear, X * np.nan, sigma=1.0),
        "`x` must be finite",
    ),
    "wrong score": (
        lambda: finite_difference_score_matching(lambda x: x[:1], X, 2 * UNIT),
        r"`score_fn` must return the shape of `x`; got \(1,\)",
    ),
    "true score": (
        lambda: esm_loss(
            jax.random.key(0), linear, VP(), BATCH, true_score=lambda x, t: x[:, None]
        ),
        r"`true_score` must return the shape of `x`; got \(2, 1\)",
    ),
    "sigma_data": (
        lambda: edm_loss(jax.random.key(0), linear, VP(), BATCH, sigma_data=-1.0),
        "`sigma_data` must be finite and above 0; got -1.0",
    ),
    "net": (
        lambda: edm_loss(jax.random.key(0), lambda x, c: x[:1], VP(), BATCH, sigma_data=1.0),
        "`net_fn` must return the shape of `x`",
    ),
    "sigmas": (
        lambda: single_sigma_score_matching(jax.random.key(0), linear, X, sigma=np.ones(2)),
        r"`sigma` must have shape \(\); got \(2,\). Give one number",
    ),
    "nan probes": (
        lambda: sliced_score_matching(linear, X, np.full((1, 2), np.nan)),
        "`probes` must be finite; 2 of its 2 values",
    ),
    "times that were not made": (
        lambda: dsm_loss(jax.random.key(0), linear, VP(), BATCH, times=lognormal_times),
        r"`times` cannot be called as it must: .*but lognormal_times\(\)",
    ),
    "a weight by name": (
        lambda: dsm_loss(jax.random.key(0), linear, VP(), BATCH, weight="likelihood"),
        "`weight` cannot be called as it must: 'str' object is not callable",
    ),
    "a score for the oracle": (
        lambda: loss_floor(jax.random.key(0), VP(), linear),
        "`oracle` must be a GaussianMixture.*got function",
    ),
    "floor": (
        lambda: loss_floor(
            jax.random.key(0), VP(), GaussianMixture(*mixture(np.float32)), num_samples=0
        ),
        "`num_samples`.*at least 2; got 0",
    ),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
    assert rademacher_probes(jax.random.key(0), 1, (2,)).shape == (1, 2)
