"""Guidance against the oracle's conditional laws, what it costs, and steps that keep a part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mixture
from jax.tree_util import Partial
from test_sde import within

import sde_score as ss
from sde_score._checks import ArgumentError
from sde_score._typing import travelling

SDES = {"vp": ss.VP(), "subvp": ss.SubVP(), "ve": ss.VE(sigma_max=5.0)}
STEPS = {
    "euler_maruyama": ss.euler_maruyama,
    "reverse_diffusion": ss.reverse_diffusion,
    "ancestral": ss.ancestral,
    "ancestral_beta": ss.ancestral_beta,
    "ddim": ss.ddim,
    "ddim_eta": ss.ddim_eta(0.5),
    "heun": ss.heun,
    "edm_stochastic": ss.edm_stochastic(0.1),
    "predictor_corrector": ss.predictor_corrector(ss.ancestral, ss.langevin(0.1)),
}
X = np.array([0.3, -0.4], np.float32)  # numpy, as a test in float64 takes it too


def smooth(x, t, context=0.0):
    """Any smooth function will do for a formula."""
    return -jnp.tanh(x) * (1.0 + t) + 0.3 * jnp.sum(jnp.asarray(context)) * x


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_exact_likelihoods_make_exact_conditional_scores(sde, x64):
    """Bayes' rule at time t: a component's p(k | x_t) gives the component's own score, and
    p_t(y | x_t) = p_t(y) p_t(x_t | y)/p_t(x_t) that of the posterior, to 1e-10.
    """
    gmm = ss.GaussianMixture(*mixture(np.float64))
    ones = [
        ss.GaussianMixture(np.ones(1), gmm.means[k : k + 1], gmm.covariances[k : k + 1])
        for k in range(3)
    ]
    logits = lambda x, t: jnp.log(ss.marginal(gmm, sde, t).responsibilities(x)) + 3.0

    @jax.jit
    def evaluate(x, t):
        score = ss.exact_score(gmm, sde)
        guided = [ss.classifier_guidance(score, logits, k)(x, t) for k in range(3)]
        twice = ss.classifier_guidance(score, logits, 2, scale=2.0)(x, t)
        posterior = gmm.posterior(lambda x: x[:1] - 0.5 * x[1:], np.array([0.7]), 0.2)
        law = lambda gmm, x, t: ss.marginal(gmm, sde, t).log_prob(x)
        log_likelihood = lambda x, t: law(posterior, x, t) - law(gmm, x, t)
        guided.append(ss.add_guidance(score, log_likelihood)(x, t))
        return guided, [ss.exact_score(law, sde)(x, t) for law in (*ones, posterior)], twice

    guided, wanted, twice = evaluate(jnp.asarray(X, float), 0.4)
    np.testing.assert_allclose(guided, wanted, rtol=1e-10)
    plain = ss.exact_score(gmm, sde)(jnp.asarray(X, float), 0.4)
    np.testing.assert_allclose(twice - guided[2], guided[2] - plain, rtol=1e-9)


def test_a_constant_classifier_changes_nothing():
    guided = ss.classifier_guidance(smooth, lambda x, t: jnp.array([0.3, -2.0]), 1, scale=5.0)
    assert np.array_equal(guided(jnp.asarray(X), 0.5), smooth(jnp.asarray(X), 0.5))


@pytest.mark.parametrize("context", [2, np.array([0.5, 1.5])], ids=["label", "vector"])
def test_classifier_free_guidance(context):
    """At w = 1 the conditional score, at 0 the unconditional, exactly; linear in w; and outside
    the interval the conditional score.
    """
    null = jax.tree.map(lambda leaf: 0 * leaf, context)
    x = jnp.asarray(X)
    conditional, plain = (smooth(x, 0.5, c) for c in (context, null))
    guided = lambda w, **options: ss.classifier_free(smooth, context, null, w, **options)(x, 0.5)
    assert np.array_equal(guided(1.0), conditional) and np.array_equal(guided(0.0), plain)
    assert np.array_equal(guided(1.0), ss.condition(smooth, context)(x, 0.5))
    want = conditional + 2.0 * (conditional - plain)
    np.testing.assert_allclose(guided(3.0), want, rtol=1e-5)  # float32
    np.testing.assert_allclose(guided(3.0, interval=(0.2, 0.6)), want, rtol=1e-5)
    assert np.array_equal(guided(3.0, interval=(0.6, 0.9)), conditional)
    assert np.array_equal(guided(3.0, interval=(0.1, 0.4)), conditional)


def conditional_score(**options):
    net = ss.nets.Conditional(ss.nets.MLP(8, 1), **options)
    params = net.init(jax.random.key(0), X, 0.5, 0)
    params = jax.tree.map(lambda p: p + 0.1, params)
    return ss.score_from_noise(ss.VP(), Partial(net.apply, params))


def test_classifier_free_guidance_of_a_network():
    """As above up to rounding, as two examples may be summed in another order than one."""
    score = conditional_score(num_classes=3)
    for w, label in ((0.0, 3), (1.0, 2)):
        guided = ss.classifier_free(score, 2, 3, w)(X, 0.5)
        np.testing.assert_allclose(guided, ss.condition(score, label)(X, 0.5), rtol=2e-6)


def test_a_label_known_too_late_to_be_refused_gives_nan():
    guided = lambda label: ss.classifier_guidance(smooth, lambda x, t: x, label)(X, 0.5)
    assert np.isnan(jax.jit(guided)(2)).all() and np.isfinite(jax.jit(guided)(1)).all()
    score = conditional_score(num_classes=3)
    guided = jax.jit(jax.vmap(lambda label: ss.condition(score, label)(X, 0.5)))
    finite = np.isfinite(guided(jnp.arange(-1, 5))).all(axis=1)
    assert finite.tolist() == [False, True, True, True, True, False]


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_what_guidance_costs():
    """In floating-point operations of compiled programs for a batch of 64: a classifier adds its
    forward and one backward pass; classifier-free guidance is one evaluation of twice the batch;
    DPS and ΠGDM add a backward pass, at most twice a forward one, of the score.
    """
    net = ss.nets.Conditional(ss.nets.MLP(64, 2), num_classes=3)
    classifier = ss.nets.Classifier(3, 64)
    x, key = jnp.ones((64, 8)), jax.random.key(0)
    params = net.init(key, x[0], 0.5, 0), classifier.init(jax.random.clone(key), x[0], 0.5)
    score, logits = Partial(net.apply, params[0]), Partial(classifier.apply, params[1])
    batched = lambda fn: lambda x: jax.vmap(fn, (0, None))(x, 0.5)
    plain = ss.condition(score, 1)
    one, twice = flops(batched(plain), x), flops(batched(plain), jnp.ones((128, 8)))
    log_p = lambda x, t: jax.nn.log_softmax(logits(x, t))[1]
    passes = flops(batched(jax.value_and_grad(log_p)), x)
    guided = flops(batched(ss.classifier_guidance(plain, logits, 1)), x)
    free = flops(batched(ss.classifier_free(score, 1, 3, 2.0)), x)
    print(f"over the parts: {guided / (one + passes):.4f}, {free / twice:.4f}")  # with -rP
    assert guided <= 1.02 * (one + passes)  # and the sum of the two
    assert free <= 1.02 * twice
    operator = ss.mask_operator(np.arange(8) < 4)
    for guide in (
        ss.dps(plain, ss.VP(), operator, jnp.ones(4), scale=1.0),
        ss.pgdm(plain, ss.VP(), operator, jnp.ones(4), noise=0.1),
    ):
        print(f"over a score: {flops(batched(guide), x) / one:.3f}")
        assert flops(batched(guide), x) <= 3.05 * one
    for network in (plain, ss.classifier_free(score, 1, 3, 2.0)):
        assert str(jax.make_jaxpr(batched(network))(x)).count("dot_general") == 9  # one a layer


def test_a_classifier_learns_the_classes_of_noised_data():
    """Its cross-entropy on fresh data comes within 0.03 nats of that of the true p(k | x_t), and
    no lower than that beyond chance.
    """
    gmm, sde = ss.GaussianMixture(*mixture()), ss.VP()
    data_key, test_key, init_key, fit_key, loss_key = jax.random.split(jax.random.key(0), 5)
    truth = lambda x, t: jnp.log(ss.marginal(gmm, sde, t).responsibilities(x))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, num):
        sample_key, label_key = jax.random.split(key)
        x = jax.vmap(gmm.sample)(jax.random.split(sample_key, num))
        return x, jax.random.categorical(label_key, jnp.log(jax.vmap(gmm.responsibilities)(x)))

    net = ss.nets.Classifier(3, 32)
    params = net.init(init_key, X, 0.5)
    loss = lambda params, key, batch: ss.classifier_loss(
        key, Partial(net.apply, params), sde, *batch
    )
    train_step = jax.jit(ss.make_train_step(loss, optimizer := optax.adam(1e-2)))
    state, data = ss.init_train_state(params, optimizer), draw(data_key, 2_000)
    for i in range(200):
        state, _ = train_step(state, jax.random.fold_in(fit_key, i), data)
    fresh = draw(test_key, 2_000)
    loss = lambda f: ss.classifier_loss(jax.random.clone(loss_key), f, sde, *fresh)
    chance = lambda x, t: jnp.log(gmm.weights)
    learned, best, chance = (
        float(jax.jit(loss)(Partial(f)))
        for f in (Partial(net.apply, state.ema_params), truth, chance)
    )
    assert best - 0.005 < learned < best + 0.03 < chance - 0.2


def test_importance_sampled_times_leave_the_classifier_s_loss():
    """Of a fixed classifier, within 5 standard errors over 20 keys."""
    x0, labels = jax.random.normal(jax.random.key(0), (500, 2)), jnp.arange(500) % 2
    logits, sde = lambda x, t: jnp.stack([3.0 * x[0], t]), ss.VP(t0=1e-2)
    losses = []
    for seed, times in enumerate((ss.uniform_times, ss.likelihood_times)):
        loss = lambda key, times=times: ss.classifier_loss(
            key, logits, sde, x0, labels, times=times
        )
        losses.append(jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(seed), 20)))
    uniform, weighted = map(np.asarray, losses)
    stderr = np.hypot(uniform.std(ddof=1), weighted.std(ddof=1)) / np.sqrt(20)
    assert abs(uniform.mean() - weighted.mean()) < 5 * stderr < 0.2 * uniform.mean()


def test_conditional_networks_say_how_to_call_them():
    score, plain = conditional_score(num_classes=3), ss.nets.MLP(8, 1)
    values = [ss.condition(score, k)(X, 0.5) for k in range(4)]
    assert len({tuple(map(float, value)) for value in values}) == 4
    unconditional = ss.score_from_noise(
        ss.VP(), Partial(plain.apply, plain.init(jax.random.key(0), X, 0.5))
    )
    draw = lambda score: ss.sample(jax.random.key(0), score, ss.VP(), (2,))
    for use, words in (
        (lambda: draw(score), "network is conditional.*sde_score.condition"),
        (lambda: draw(ss.condition(score, 4)), "`context` must be a label, 0 to 2, or 3 for none"),
        (lambda: draw(ss.condition(score, 0.5)), "`context` must be a label.*got 0.5"),
        (lambda: draw(ss.condition(score, jnp.ones(2))), r"`context` must have shape \(\); got"),
        (lambda: draw(ss.classifier_free(score, 7, 3, 2.0)), "`context` must be a label.*got 7"),
        (lambda: draw(ss.classifier_free(score, 1, -1, 2.0)), "`context` must be a label.*got -1"),
        (lambda: draw(ss.condition(unconditional, 1)), "takes no other context.*nets.Conditional"),
        (lambda: draw(ss.classifier_free(unconditional, 1, 3, 2.0)), "takes no other context"),
        (lambda: draw(ss.condition(lambda x, t: -x, 1)), "must take a context.*as it is"),
        (lambda: draw(lambda x, t, context: -x), "missing 1.*'context'.*sde_score.condition"),
    ):
        with pytest.raises(ArgumentError, match=f"(?s){words}"):
            use()


@jax.jit
def draw(key, score, sde, step):
    ts = jnp.linspace(sde.t1, sde.t0, 6)
    return ss.sample(key, score, sde, (2, 3), step=step, ts=ts, finish=None)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_what_is_known_is_kept_and_nothing_else(step):
    """All known: the observation. None known: the sampler itself. Both bit for bit, as is the
    known part of some, after denoising too. A mask that is not yet known, empty, leaves the
    sampler's values up to what the compiler makes of them.
    """
    score, sde, key = Partial(smooth), ss.VP(t0=1e-3, beta_max=5.0), jax.random.key(3)
    observed = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    some = np.array([[True, False, True], [False, False, True]])
    plain = draw(jax.random.clone(key), score, sde, travelling(step))
    for mask in (np.ones((2, 3), bool), some, np.zeros((2, 3), bool)):
        keeping = ss.inpaint(step, observed, mask)
        x = draw(jax.random.clone(key), score, sde, keeping)
        finished = ss.keep_observed(keeping)(score, sde, x, sde.t0)
        denoised = ss.denoise(score, sde, x, sde.t0)
        assert np.array_equal(x[mask], observed[mask])
        assert np.array_equal(finished, jnp.where(mask, observed, denoised))
        assert mask.any() or np.array_equal(x, plain)
        assert mask.all() or not np.any(x[~mask] == observed[~mask])
    if step is not ss.ddim:
        return
    later = jax.jit(
        lambda mask: draw(key, score, sde, ss.inpaint(step, observed, mask, num_resamples=3))
    )
    np.testing.assert_allclose(later(np.zeros((2, 3), bool)), plain, rtol=1e-5)


@pytest.mark.parametrize(("name", "resamples"), [("vp", 1), ("subvp", 1), ("ve", 3)])
def test_the_kept_part_has_the_law_of_its_time(name, resamples):
    """N(alpha_s observed, sigma_s²), at s below the t of the step, whatever the step did; over
    10,000 draws, with and without resampling.
    """
    sde, observed, mask = SDES[name], jnp.array([0.8, -0.5]), jnp.array([True, False])
    step = ss.inpaint(ss.ancestral, observed, mask, num_resamples=resamples)
    keys = jax.random.split(jax.random.key(resamples), 10_000)
    place = Partial(smooth), sde, jnp.asarray(X), jnp.array(0.5), jnp.array(0.3)
    x = jax.jit(jax.vmap(step, (0, *[None] * 5)))(keys, *place)
    z = (x[:, 0] - sde.alpha(0.3) * 0.8) / sde.sigma(0.3)
    within(z, 0.0)
    within(z**2, 1.0)


@pytest.mark.parametrize("s", [0.3, 1e-3])
def test_resampling_returns_by_the_forward_process(s):
    """With steps that only copy the kept entry: from N(alpha_s observed, sigma_s²) up again to t's
    law, also in the last step; and of what is not kept to N(a x, v), over 10,000 draws.
    """
    sde, observed, mask, t = ss.VP(t0=1e-3), jnp.array([0.8, 0.0, 0.0]), np.arange(3) < 1, 0.5
    copy = lambda key, score_fn, sde, x, t, s: x.at[1].set(x[0])
    step = ss.inpaint(copy, observed, mask, num_resamples=2)
    keys = jax.random.split(jax.random.key(7), 10_000)
    place = Partial(smooth), sde, jnp.array([0.3, -0.4, 0.6]), jnp.array(t), jnp.array(s)
    x = jax.jit(jax.vmap(step, (0, *[None] * 5)))(keys, *place)
    a = sde.alpha(t) / sde.alpha(s)
    v = sde.sigma(t) ** 2 - (a * sde.sigma(s)) ** 2
    copied = (x[:, 1] - sde.alpha(t) * 0.8) / sde.sigma(t)
    free = (x[:, 2] - a * 0.6) / jnp.sqrt(v)
    for z in (copied, free):
        within(z, 0.0)
        within(z**2, 1.0)


def test_colourising_is_inpainting_in_the_published_basis(x64):
    """x M in the orthonormal basis M of the published code, completed by QR, its first coordinate
    replaced, and back; the mean of the channels ends as observed.
    """
    basis = np.linalg.qr(np.array([[1.0, 0.2, 0.3], [1.0, -0.4, 0.1], [1.0, 0.5, -0.9]]))[0]
    basis[:, 0] = np.abs(basis[:, 0])
    np.testing.assert_allclose(basis[:, 0], 3**-0.5)
    grey, key, sde = jnp.array([0.3, -0.7]), jax.random.key(5), ss.VP()
    x, (t, s) = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), (jnp.array(0.5), jnp.array(0.4))
    noise = []

    def recorded(x, observation_noise, alpha, sigma):
        noise.append(observation_noise)
        return x

    colouring = ss.colourise(ss.ddim, grey)
    # the same noise, seen by a part kept that keeps nothing
    spy = Partial(colouring.func, colouring.args[0], Partial(recorded), *colouring.args[2:])
    plain = spy(jax.random.clone(key), smooth, sde, x, t, s)
    coordinates = np.array(plain @ basis)
    z = np.asarray(noise[0] @ basis)[:, 0]
    coordinates[:, 0] = sde.alpha(s) * np.sqrt(3.0) * grey + sde.sigma(s) * z
    got = colouring(key, smooth, sde, x, t, s)
    np.testing.assert_allclose(got, coordinates @ basis.T, rtol=1e-12)
    end = draw(jax.random.key(6), Partial(smooth), sde, colouring)
    finished = ss.keep_observed(colouring)(smooth, sde, end, sde.t0)
    means = jnp.mean(jnp.stack([end, finished]), axis=-1)
    np.testing.assert_allclose(means, [grey, grey], rtol=1e-11)


def test_resampling_lessens_the_projection_s_bias():
    """On a correlated Gaussian, where x_1 given x_0 = 1.5 is N(0.9·1.5, 1 − 0.9²): of the mean,
    ten resamples leave less than half of the bias of one; both pull too little (2,000 draws).
    """
    sde, observed, mask = ss.VP(t0=1e-3), jnp.array([1.5, 0.0]), jnp.array([True, False])
    gmm = ss.GaussianMixture(np.ones(1), np.zeros((1, 2)), np.array([[[1.0, 0.9], [0.9, 1.0]]]))
    score, keys = ss.exact_score(gmm, sde), jax.random.split(jax.random.key(0), 2_000)
    ts, bias = ss.log_snr_grid(sde, 30), []
    for resamples in (1, 10):
        step = ss.inpaint(ss.ancestral, observed, mask, num_resamples=resamples)
        one = lambda key, step: ss.sample(key, score, sde, (2,), step=step, ts=ts, finish=None)
        x = jax.jit(jax.vmap(one, (0, None)))(jax.random.clone(keys), step)
        bias.append(float(jnp.mean(x[:, 1])) - 0.9 * 1.5)
    stderr = np.sqrt((1 - 0.9**2) / 2_000)
    assert bias[0] < -10 * stderr and abs(bias[1]) < 0.5 * abs(bias[0])


GUIDES = {
    "classifier_free": lambda s, x: ss.classifier_free(smooth, x[0], 0.0, 2.0)(x, 0.5),
    "dps": lambda s, x: ss.dps(
        s, ss.VP(), ss.mask_operator(np.array([True, False])), jnp.ones(1), scale=1.0
    )(x, 0.5),
    "pgdm": lambda s, x: ss.pgdm(
        s, ss.VP(), ss.mask_operator(np.array([True, False])), jnp.ones(1), noise=0.1
    )(x, 0.5),
    "inpaint": lambda s, x: ss.inpaint(
        ss.heun, jnp.ones(2), jnp.array([True, False]), num_resamples=2
    )(jax.random.key(0), s, ss.VP(), x, jnp.array(0.5), jnp.array(0.4)),
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_sample_does_not_depend_on_its_neighbours(name):
    batch = jnp.array([[0.3, -0.4], [1.0, 0.2], [-0.7, 0.1]])
    other = batch.at[1:].multiply(100.0)
    run = jax.jit(jax.vmap(lambda x: GUIDES[name](Partial(smooth), x)))
    assert np.array_equal(run(batch)[0], run(other)[0])
    assert not np.array_equal(run(batch)[1], run(other)[1])


MASK = np.array([True, False])
BAD = {
    "label too large": (
        lambda: ss.classifier_guidance(smooth, lambda x, t: jnp.ones(3), 3)(X, 0.5),
        "`label` must be among the classes, 0 to 2; got 3",
    ),
    "negative label": (
        lambda: ss.classifier_guidance(smooth, lambda x, t: jnp.ones(3), -1)(X, 0.5),
        "`label` must be among the classes",
    ),
    "fractional label": (
        lambda: ss.classifier_guidance(smooth, lambda x, t: jnp.ones(3), 0.5)(X, 0.5),
        "`label` be one whole number; got.*0.5",
    ),
    "batched classifier": (
        lambda: ss.classifier_guidance(smooth, lambda x, t: jnp.ones((1, 3)), 0)(X, 0.5),
        r"`logits_fn` must return \[num_classes\] for one example.*\(1, 3\)",
    ),
    "labels": (
        lambda: ss.classifier_loss(
            jax.random.key(0), lambda x, t: jnp.ones(3), ss.VP(), X[None], jnp.zeros(2, int)
        ),
        r"`labels` must have shape \(1,\); got \(2,\)",
    ),
    "labels too large": (
        lambda: ss.classifier_loss(
            jax.random.key(0), lambda x, t: jnp.ones(3), ss.VP(), X[None], jnp.array([3])
        ),
        "`labels` must be among the classes, 0 to 2; got int32",
    ),
    "vector likelihood": (
        lambda: ss.add_guidance(smooth, lambda x, t: x)(X, 0.5),
        r"`log_likelihood_fn` must return a scalar; got shape \(2,\)",
    ),
    "null": (
        lambda: ss.classifier_free(smooth, X, 0, 2.0),
        r"`null` must have the shapes of `context`, \(2,\); got \(\)",
    ),
    "interval": (
        lambda: ss.classifier_free(smooth, 1, 0, 2.0, interval=(0.5, 0.1)),
        r"`interval` must be \(low, high\), two times",
    ),
    "mask of numbers": (
        lambda: ss.inpaint(ss.ddim, X, MASK * 1.0),
        "`mask` must be Boolean; got f",
    ),
    "mask as a list": (lambda: ss.inpaint(ss.ddim, X, [1, 0]), "`mask` must be Boolean; got int"),
    "multistep": (lambda: ss.inpaint(ss.adams(), X, MASK), "`step` must be a Step, such as"),
    "integers": (
        lambda: ss.inpaint(ss.ddim, jnp.arange(2), MASK),
        "`observed` must be floating point; got int32. Convert it",
    ),
    "three ends": (
        lambda: ss.classifier_free(smooth, 1, 0, 2.0, interval=(0.1, 0.2, 0.3)),
        r"`interval` must be \(low, high\)",
    ),
    "no scale": (lambda: ss.classifier_free(smooth, 1, 0, None), "`scale` must be one number"),
    "mask's shape": (
        lambda: ss.inpaint(ss.ddim, X, np.array([True])),
        r"`mask` must have shape \(2,\); got \(1,\)",
    ),
    "observation's shape": (
        lambda: draw(jax.random.key(0), Partial(smooth), ss.VP(), ss.inpaint(ss.ddim, X, MASK)),
        r"`observed` must have shape \(2, 3\); got \(2,\)",
    ),
    "nan observed": (
        lambda: ss.inpaint(ss.ddim, jnp.array([jnp.nan, 0.0]), MASK),
        "`observed` must be finite",
    ),
    "grey's shape": (
        lambda: draw(jax.random.key(0), Partial(smooth), ss.VP(), ss.colourise(ss.ddim, X[:1])),
        r"`grey` must have shape \(2, 3\); got \(1, 3\)",
    ),
    "resamples": (
        lambda: ss.inpaint(ss.ddim, X, MASK, num_resamples=0),
        "`num_resamples` must be a Python integer of at least 1",
    ),
    "keep": (lambda: ss.keep_observed(ss.ddim), "`step` must be one that inpaint or colourise"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ArgumentError, match=match):
        attempt()
