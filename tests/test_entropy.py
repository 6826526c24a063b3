"""Entropy gradients against closed forms, the alternating step, annealed importance sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sde_score as ss
from benchmarks import bench_entropy
from experiments._ais import ais_log_weights, log_mean_exp, temperatures, two_way_interval
from experiments._vae import Encoder, encoder_log_prob

NOISE = jnp.array([0.3, -0.4])


def linear_score(a):
    """Of a ε with ε ~ N(0, I)."""
    precision = jnp.linalg.inv(a @ a.T)
    return lambda z: -precision @ z


def test_the_gradient_of_a_gaussians_entropy_is_unbiased(x64):
    """H = log|det A| + const, whose gradient is A⁻ᵀ; within 5 standard errors."""
    a = jnp.array([[1.0, 0.5], [-0.3, 0.8]])
    score = linear_score(a)
    one = lambda a, noise: ss.entropy_surrogate(score, lambda e: a @ e, noise)
    noise = jax.random.normal(jax.random.key(0), (50_000, 2))
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(one), (None, 0)))(a, noise)
    stderr = grads.std(0, ddof=1) / len(noise) ** 0.5
    assert np.all(stderr < 0.02)  # against entries of up to 1.05
    assert np.all(np.abs(grads.mean(0) - jnp.linalg.inv(a).T) < 5 * stderr)
    np.testing.assert_allclose(values.mean(), 2.0, atol=5 * values.std() / len(noise) ** 0.5)


@pytest.mark.parametrize("target", ["gaussian", "mixture", "flow"])
def test_a_residual_layer_on_every_law_of_the_benchmark(target):
    """Its gradient by Stein's identity: z within 5 of 8 entries; and zero without the score."""
    law = bench_entropy.laws(2)[target]
    waves = jnp.array([[0.8, -0.3], [0.5, 1.1]])
    truth = np.concatenate([np.eye(2), waves.T * law.mean_cos(waves)[None]], axis=1)
    draws = law.draw(jax.random.key(1), 40_000).reshape(200, -1, 2)
    each = jax.jit(
        lambda y: jax.lax.map(lambda y: bench_entropy.gradient(law.score, waves, y), y)
    )(draws)
    found = np.asarray(each, np.float64)
    stderr = found.std(0, ddof=1) / len(found) ** 0.5
    assert np.all(np.abs(found.mean(0) - truth) < 5 * stderr) and stderr.max() < 0.02


def test_estimated_scores_serve_too():
    """Stein's estimate from the same draws is within its ridge's bias; a zero score gives 0."""
    a = jnp.array([[1.0, 0.5], [-0.3, 0.8]])
    noise = jax.random.normal(jax.random.key(2), (300, 2))

    def surrogate(a, score):
        one = lambda e: ss.entropy_surrogate(score, lambda e: a @ e, e)
        return jnp.mean(jax.vmap(one)(noise))

    stein = lambda a: surrogate(a, ss.stein_score(noise @ a.T))  # no gradient flows into it
    exact = jnp.linalg.inv(a).T
    assert jnp.linalg.norm(jax.grad(stein)(a) - exact) < 0.15 * jnp.linalg.norm(exact)
    np.testing.assert_array_equal(jax.grad(surrogate)(a, jnp.zeros_like), jnp.zeros((2, 2)))


def test_samplers_without_an_entropy_are_refused():
    """In one line, that says nothing of times, weights or images."""
    score = lambda z: -z
    takes = r"`score_fn` must take the latent z = sampler\(noise\), of shape \(2,\), and return"
    own = ss.stein_score(jax.random.normal(jax.random.key(0), (20, 3)))
    for score_fn, sampler, noise, words in (
        (score, lambda e: jnp.ones(2), NOISE, "`sampler` must depend on `noise`"),
        (
            score,
            lambda e: jnp.tile(e, 2),
            NOISE,
            "`noise` must have at least as many .*, 4; got 2",
        ),
        (score, lambda e: e / 0.0, NOISE, "`sampler\\(noise\\)` must be finite"),
        (score, lambda e, x: e, NOISE, "`sampler` must take `noise`, .*TypeError.*missing"),
        (score, lambda e: e @ jnp.ones(3), NOISE, "`sampler` must take `noise`, .*TypeError"),
        (score, lambda e: (e, e), NOISE, "`sampler` must take .*; it returned tuple. Close over"),
        (score, lambda e: None, NOISE, "`sampler` must take .*; it returned NoneType"),
        (score, lambda e: jnp.argsort(e), NOISE, "`sampler` must take .*; it returned int"),
        (score, lambda e: e, None, "`noise` must be an array; got NoneType. Draw it"),
        (score, lambda e: e, jnp.arange(2), "`noise` must be floating point; got int32. Draw it"),
        (score, lambda e: e, jax.random.key(0), "`noise` must be floating point; got key.*Draw"),
        (lambda z: jnp.ones(3), lambda e: e, NOISE, f"{takes} .*; it returned shape \\(3,\\)"),
        (lambda z: z @ jnp.ones(3), lambda e: e, NOISE, f"{takes} .*; it failed by TypeError"),
        (own, lambda e: e, NOISE, f"{takes} .*; it failed by ArgumentError: `x` must have shape"),
        (lambda z: None, lambda e: e, NOISE, f"{takes} .*; it returned NoneType"),
        (lambda z: z * jnp.nan, lambda e: e, NOISE, "the score network has diverged. Lower its"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            ss.entropy_surrogate(score_fn, sampler, noise)
        message = str(caught.value)
        assert "\n" not in message and "uniform" not in message and "_weight" not in message


def test_what_is_known_only_as_it_runs():
    """Inside a gradient only the structure is known; a sampler may look at its noise outside."""
    score = lambda z: -z
    deaf = lambda a: ss.entropy_surrogate(score, lambda e: a * jnp.ones(2), NOISE)
    with pytest.raises(ValueError, match="`sampler` must depend on `noise`"):
        jax.jit(jax.grad(deaf))(2.0)
    broken = lambda a: ss.entropy_surrogate(score, lambda e: e / a, NOISE)
    with pytest.raises(Exception, match="`sampler\\(noise\\)` must be finite"):
        jax.block_until_ready(jax.jit(jax.grad(broken))(0.0))
    diverged = lambda a: ss.entropy_surrogate(lambda z: z / 0.0, lambda e: a * e, NOISE)
    with pytest.raises(Exception, match="the score network has diverged"):
        jax.block_until_ready(jax.jit(jax.grad(diverged))(2.0))
    for sampler in (lambda e: e if e[0] > 0 else -e, lambda e: jnp.asarray(np.abs(e))):
        np.testing.assert_allclose(ss.entropy_surrogate(score, sampler, NOISE), 0.25, rtol=1e-6)


def test_alternating_learns_a_gaussian_posterior():
    """max E log p(z) + H over z = a ε: a → 1.5 for p = N(0, 1.5²), the score −λz → −z/a²; and each
    step is its losses' own descent.
    """

    def model_loss(a, score, key, batch):
        one = lambda e: ss.entropy_surrogate(lambda z: -score["w"] * z, lambda e: a["a"] * e, e)
        energy = 0.5 * jnp.mean((a["a"] * batch) ** 2) / 1.5**2
        return energy - jnp.mean(jax.vmap(one)(batch))

    def score_loss(score, a, key, batch):
        loss = lambda z: ss.sliced_score_matching(lambda z: -score["w"] * z, z, jnp.ones((1, 1)))
        return jnp.mean(jax.vmap(loss)(a["a"] * batch))

    sgd = optax.sgd(0.05)
    step = ss.make_alternating_step(model_loss, score_loss, sgd, sgd, score_steps=3)
    init = ss.AlternatingState(
        ss.init_train_state({"a": jnp.array(0.7)}, sgd),
        ss.init_train_state({"w": jnp.array(0.2)}, sgd),
    )
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (500, 1))
    batch = draw(0)
    state, metrics = step(init, jax.random.key(4), batch)
    v = float(jnp.mean(batch**2))
    w = 0.2
    for _ in range(3):  # the loss is −w + ½ w² a² v
        w -= 0.05 * (w * 0.7**2 * v - 1)
    np.testing.assert_allclose(state.score.params["w"], w, rtol=1e-5)  # float32
    slope = 0.7 * v / 1.5**2 - w * 0.7 * v
    np.testing.assert_allclose(state.model.params["a"], 0.7 - 0.05 * slope, rtol=1e-5)
    np.testing.assert_allclose(metrics["model_grad_norm"], abs(slope), rtol=1e-4)
    assert int(state.score.step) == 3 and int(state.model.step) == 1
    advance = lambda s, i: (step(s, jax.random.fold_in(jax.random.key(5), i), draw(i))[0], None)
    state, _ = jax.jit(lambda s: jax.lax.scan(advance, s, jnp.arange(600)))(state)
    # the last batches' noise: sd of a about 1.5 (2/500)^½ over some tens of steps
    np.testing.assert_allclose(state.model.params["a"], 1.5, atol=0.06)
    np.testing.assert_allclose(state.score.params["w"], 1 / 1.5**2, atol=0.05)
    with pytest.raises(ValueError, match="`model_loss` must be a function"):
        ss.make_alternating_step(None, score_loss, sgd, sgd)
    with pytest.raises(ValueError, match="`score_steps` must be a Python integer"):
        ss.make_alternating_step(model_loss, score_loss, sgd, sgd, score_steps=0)
    for wrong in (init.model, ss.AlternatingState(init.model.params, init.score), None):
        with pytest.raises(ValueError, match="`state` must be AlternatingState.*init_train_state"):
            step(wrong, jax.random.key(4), batch)


def test_every_step_of_either_draws_for_itself():
    """A loss p·n with n of its own key: descent by 1 leaves p = −Σ n, and the gradient is n."""

    def model_loss(params, other, key, batch):  # two keys of its own, as of two parts of a batch
        return sum(params["p"][i] * jax.random.normal(jax.random.fold_in(key, i)) for i in (0, 1))

    score_loss = lambda params, other, key, batch: params["p"] * jax.random.normal(key)
    sgd = optax.sgd(1.0)
    step = ss.make_alternating_step(model_loss, score_loss, sgd, sgd, score_steps=2)
    model, score = (ss.init_train_state({"p": jnp.zeros(shape)}, sgd) for shape in (2, ()))
    state, metrics = step(ss.AlternatingState(model, score), jax.random.key(6), None)
    second = abs(metrics["score_grad_norm"])
    first = abs(metrics["score_loss"]) / second  # the second step's loss is −n_1 n_2
    total = abs(state.score.params["p"])
    np.testing.assert_allclose(
        min(abs(total - first - second), abs(total - abs(first - second))), 0, atol=1e-5
    )
    draws = np.sort(np.abs([first, second, *state.model.params["p"]]))
    assert draws[0] > 1e-3 and np.all(np.diff(draws) > 1e-3)


def test_the_benchmarks_errors_are_those_of_known_draws():
    """Gradients truth + b + s n in 2 × 4 entries: relative bias and std, and the rest of them."""
    truth, num = np.arange(1.0, 9.0).reshape(2, 4), 4_000
    norm = np.linalg.norm(truth)
    noise = np.random.default_rng(0).normal(size=(num, 2, 4))
    off = np.zeros((2, 4))
    off[:, 2:] = 0.3
    got = bench_entropy.errors(truth + off + 0.2 * noise, truth, 2)
    # each is a mean over 32,000 numbers: 1 % is more than 2 standard errors of a mean square
    bias, std = 0.3 * 4**0.5 / norm, 0.2 * 8**0.5 / norm
    np.testing.assert_allclose(got["bias"], bias, rtol=0.03)
    np.testing.assert_allclose(got["std"], std, rtol=0.02)
    np.testing.assert_allclose(got["error"], np.hypot(bias, std), rtol=0.02)
    linear, waves = (np.linalg.norm(truth[:, part]) for part in (slice(2), slice(2, None)))
    np.testing.assert_allclose(got["error_linear"], 0.4 / linear, rtol=0.02)
    np.testing.assert_allclose(got["error_waves"], np.hypot(0.4, 0.6) / waves, rtol=0.02)
    assert abs(got["z"] - 0.3 / 0.2 * num**0.5) < 6  # the largest of 4, each with an sd of 1.5
    fair = bench_entropy.errors(truth + 0.2 * noise, truth, 2)
    assert fair["z"] < 4 and fair["bias"] < 3 * std / num**0.5


def test_an_interval_over_seeds_and_digits():
    """a_s + b_d: the variances of both means; where one is 0, Student's of the other."""
    a, b = np.random.default_rng(1).normal(size=(2, 5))
    b = np.concatenate([b, -b, b + 1])
    mean, low, high = two_way_interval(a[:, None] + 0 * b[None])
    half = 2.776 * a.std(ddof=1) / 5**0.5  # t of 4 degrees of freedom
    np.testing.assert_allclose([mean, low, high], a.mean() + half * np.array([0, -1, 1]), 1e-3)
    _, low, high = two_way_interval(a[:, None] + b[None])
    parts = np.array([a.var(ddof=1) / 5, b.var(ddof=1) / 15])
    assert 1.96 < (high - low) / 2 / parts.sum() ** 0.5 < 2.776 * 1.001


def test_an_implicit_encoders_density_by_quadrature():
    """Its moments are its draws', within 5 standard errors; without ε₁ it is in closed form."""
    x, noise = jnp.array([0.3]), jax.random.normal(jax.random.key(1), (20_000, 4))
    line = jnp.linspace(-8.0, 8.0, 41)
    z = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
    for implicit in (False, True):
        encoder = Encoder(8, implicit)
        params = {"encoder": encoder.init(jax.random.key(0), x, noise[0])}
        apply = lambda e, encoder=encoder, params=params: encoder.apply(params["encoder"], x, e)
        log_q = jax.jit(partial(encoder_log_prob, encoder, num=25))(params, x, z)
        mass = jnp.exp(log_q) * (line[1] - line[0]) ** 2
        np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-4)
        draws = jax.jit(jax.vmap(apply))(noise)[0]
        values = jnp.concatenate([draws, draws**2], axis=1)
        stderr = values.std(0) / len(values) ** 0.5
        found = mass @ jnp.concatenate([z, z**2], axis=1)
        assert np.all(np.abs(values.mean(0) - found) < 5 * stderr) and stderr.max() < 0.05
        if not implicit:
            mean, log_std = apply(jnp.zeros(4))
            exact = jax.scipy.stats.norm.logpdf(z, mean[None], jnp.exp(log_std)[None]).sum(1)
            np.testing.assert_allclose(log_q, exact, rtol=1e-5, atol=1e-5)


def test_annealed_importance_sampling_finds_a_linear_decoders_likelihood(x64):
    """x = W z + ½ noise: log N(x; 0, W Wᵀ + ¼ I); E w is exact at any step size."""
    w = jnp.array([[1.0, 0.5], [-0.7, 1.2], [0.3, 0.4]])
    x = jnp.array([1.5, -2.0, 0.4])
    covariance = w @ w.T + 0.25 * jnp.eye(3)
    truth = jax.scipy.stats.multivariate_normal.logpdf(x, jnp.zeros(3), covariance)
    likelihood = lambda z: jnp.sum(jax.scipy.stats.norm.logpdf(x, w @ z, 0.5))
    run = jax.jit(
        lambda key, sizes, adapt: ais_log_weights(
            key, likelihood, 2, sizes, num_chains=1_000, adapt=adapt
        )
    )
    _, sizes = run(jax.random.key(0), jnp.ones(60), 0.3)
    assert sizes[0] == 1.0 and sizes[-1] < 0.6  # the posterior is narrower than the prior
    log_w, used = run(jax.random.key(1), sizes, 0.0)
    np.testing.assert_array_equal(used, sizes)
    ratio = jnp.exp(log_w - truth)
    stderr = ratio.std(ddof=1) / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 5 * stderr < 0.15
    assert abs(log_mean_exp(log_w) - truth) < 5 * stderr
    betas = temperatures(60)
    assert betas[0] == 0 and betas[-1] == 1 and np.all(np.diff(betas) > 0)
