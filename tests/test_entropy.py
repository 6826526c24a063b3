"""Entropy gradients against closed forms, the alternating step, annealed importance sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sde_score as ss
from benchmarks import bench_entropy
from experiments._ais import ais_log_weights, log_mean_exp, temperatures

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
    score = lambda z: -z
    for sampler, words in (
        (lambda e: jnp.ones(2), "`sampler` must depend on `noise`"),
        (lambda e: jnp.tile(e, 2), "`noise` must have at least as many numbers as z .*, 4; got 2"),
        (lambda e: e / 0.0, "`sampler\\(noise\\)` must be finite"),
        (lambda e, x: e, "`sampler` cannot be called as it must"),
    ):
        with pytest.raises(ValueError, match=words):
            ss.entropy_surrogate(score, sampler, NOISE)
    with pytest.raises(ValueError, match="`score_fn` must return the shape of `x`; got \\(3,\\)"):
        ss.entropy_surrogate(lambda z: jnp.ones(3), lambda e: e, NOISE)
    # inside a gradient too, where only the structure is known
    deaf = lambda a: ss.entropy_surrogate(score, lambda e: a * jnp.ones(2), NOISE)
    with pytest.raises(ValueError, match="`sampler` must depend on `noise`"):
        jax.jit(jax.grad(deaf))(2.0)
    broken = lambda a: ss.entropy_surrogate(score, lambda e: e / a, NOISE)
    with pytest.raises(Exception, match="`sampler\\(noise\\)` must be finite"):
        jax.block_until_ready(jax.jit(jax.grad(broken))(0.0))


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
