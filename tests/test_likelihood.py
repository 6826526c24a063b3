"""Likelihoods against the oracle, their error bars, bits per dimension and dequantisation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from conftest import mixture, slow
from jax.tree_util import Partial

import sde_score as ss
from sde_score._checks import ArgumentError

SDES = {
    "VP": ss.VP(t0=1e-3),
    "SubVP": ss.SubVP(t0=1e-2),
    "VE": ss.VE(sigma_min=0.05, sigma_max=10.0, t0=1e-3),
}


def oracle(dim):
    """Two or three correlated components in d dimensions."""
    if dim == 2:
        return ss.GaussianMixture(*mixture(np.float64))
    rng = np.random.default_rng(dim)
    factors = rng.normal(size=(2, dim, dim)) / np.sqrt(dim)
    covariances = 0.4 * factors @ factors.mT + 0.3 * np.eye(dim)
    return ss.GaussianMixture(np.array([0.6, 0.4]), 0.7 * rng.normal(size=(2, dim)), covariances)


def terminal(gmm, sde):
    """The oracle's own log p_t1: the prior's mismatch is a matter of its own."""
    return ss.marginal(gmm, sde, sde.t1).log_prob


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *(("VP", 2), ("VP", 64), ("SubVP", 2), ("VE", 2)),
        *(pytest.param(name, 16, marks=pytest.mark.slow) for name in SDES),
    ],
)
def test_exact_likelihood_and_round_trip(name, dim, x64):
    """log p_t0 within 1e-6 nats per dimension, and decode(encode(x)) = x within 1e-5; solver
    tolerance 1e-9, so some 1e-8 is expected.
    """
    sde, gmm = SDES[name], oracle(dim)
    start = ss.marginal(gmm, sde, sde.t0)
    x = jax.vmap(start.sample)(jax.random.split(jax.random.key(1), 4 if dim < 64 else 1))

    @jax.jit
    @jax.vmap
    def run(x):
        score, tolerance = ss.exact_score(gmm, sde), {"rtol": 1e-9, "atol": 1e-9}
        out = ss.exact_log_likelihood(
            score, sde, x, terminal_log_prob=terminal(gmm, sde), **tolerance
        )
        decoded = ss.probability_flow(
            score, sde, out.latent, start=sde.t1, stop=sde.t0, **tolerance
        )
        return out, decoded

    out, decoded = run(x)
    error = np.abs(out.log_prob - jax.vmap(start.log_prob)(x)).max() / dim
    back = np.abs(decoded - x).max()
    print(f"{name}, d = {dim}: {error:.1e} nats per dimension, round trip {back:.1e}")
    assert error < 1e-6
    assert back < 1e-5
    assert np.all(np.asarray(out.stderr) == 0)


@pytest.mark.parametrize("dim", [2, slow(16), slow(64)])
def test_exact_likelihood_in_single_precision(dim):
    """Within 1e-4 nats per dimension at the default tolerance of 1e-5."""
    with jax.enable_x64(True):
        sde, gmm = SDES["VP"], oracle(dim)
        start = ss.marginal(gmm, sde, sde.t0)
        x = jax.vmap(start.sample)(jax.random.split(jax.random.key(1), 4))
        truth = np.asarray(jax.vmap(start.log_prob)(x))
        parts = [np.asarray(part, np.float32) for part in (gmm.weights, gmm.means)]
        parts.append(np.asarray(gmm.covariances, np.float32))
        x = np.asarray(x, np.float32)
    gmm = ss.GaussianMixture(*parts)
    end = terminal(gmm, sde)
    run = lambda x: ss.exact_log_likelihood(
        ss.exact_score(gmm, sde), sde, x, terminal_log_prob=end
    )
    got = jax.jit(jax.vmap(run))(x)
    assert got.log_prob.dtype == np.float32
    error = np.abs(got.log_prob - truth).max() / dim
    print(f"float32, d = {dim}: {error:.1e} nats per dimension")
    assert error < 1e-4


@pytest.mark.parametrize("dim", [16, slow(64)])
def test_error_bars_of_hutchinson(dim, x64):
    """16 probes: the nominal 95 % interval covers the truth on 91 to 98 % of 200 keys, and 3
    standard errors on at least 98 % (Student t with 15 degrees: 99.1 %). The solver's error, 1e-5,
    is far below the standard error.
    """
    sde, gmm = SDES["VP"], oracle(dim)
    start = ss.marginal(gmm, sde, sde.t0)
    x = start.sample(jax.random.key(2))
    options = {"terminal_log_prob": terminal(gmm, sde), "rtol": 1e-6, "atol": 1e-6}
    run = jax.jit(
        jax.vmap(
            lambda key: ss.log_likelihood(
                key, ss.exact_score(gmm, sde), sde, x, num_probes=16, **options
            )
        )
    )
    out = run(jax.random.split(jax.random.key(3), 200))
    z = (np.asarray(out.log_prob) - start.log_prob(x)) / np.asarray(out.stderr)
    stderr = np.asarray(out.stderr)
    within = np.mean(np.abs(z) < 3)
    print(f"within 3 standard errors: {within:.1%}; median standard error {np.median(stderr):.4f}")
    low, high = ss.confidence_interval(np.asarray(out.log_prob), stderr, 16)
    covered = np.mean((low < start.log_prob(x)) & (start.log_prob(x) < high))
    print(f"d = {dim}: the 95 % interval covers the truth on {covered:.1%} of 200 keys")
    assert 0.91 <= covered <= 0.98
    assert within >= (0.98 if dim == 16 else 0.96)  # of 200: 0.991 ± 0.007
    assert np.median(stderr) > 1e-2  # the solver's error is below a thousandth of it
    assert 0.7 < z.std() < 1.5  # √(15/13) = 1.07 for Student's t with 15 degrees
    # A bias, or a sum over probes in place of their mean, would move the average of 200.
    assert abs(np.mean(z)) < 5 * z.std() / np.sqrt(200)


def test_one_probe_has_no_error_bar_and_probes_are_averaged(x64):
    """One vector given as each probe: the estimate of any number of probes is the same, and its
    standard error 0.
    """
    sde, gmm, x = SDES["VP"], oracle(2), jnp.array([0.4, -0.3])
    score, probe = ss.exact_score(gmm, sde), jnp.array([1.0, -1.0])

    def run(num_probes):
        return ss.log_likelihood(
            jax.random.key(0),
            score,
            sde,
            x,
            num_probes=num_probes,
            probes=lambda key, num, shape: jnp.broadcast_to(probe, (num, *shape)),
            ts=ss.uniform_grid(sde, 16),
        )

    one, three = run(1), run(3)
    assert np.isnan(one.stderr) and float(three.stderr) < 1e-12
    np.testing.assert_allclose(three.log_prob, one.log_prob, rtol=1e-12)


def test_direction_of_time(x64):
    """Encoding maps data to the prior along the closed form: larger times are noisier."""
    covariance = np.array([[[0.6, 0.2], [0.2, 0.4]]])
    gmm, sde = ss.GaussianMixture(np.ones(1), np.array([[0.7, -0.4]]), covariance), SDES["VE"]
    x, score = jnp.array([1.1, -0.2]), ss.exact_score(gmm, sde)
    out = ss.exact_log_likelihood(score, sde, x, rtol=1e-8, atol=1e-8)
    encoded = ss.gaussian_flow(gmm, sde, x, sde.t0, sde.t1)
    np.testing.assert_allclose(out.latent, encoded, rtol=1e-6)  # the solver's tolerance
    flowed = ss.probability_flow(score, sde, x, start=sde.t0, stop=sde.t1, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(flowed, encoded, rtol=1e-6)
    assert np.linalg.norm(encoded) > 5 * np.linalg.norm(x)
    # The default terminal density is the prior's.
    ours = out.log_prob - ss.prior_log_prob(sde, out.latent)
    truth = ss.marginal(gmm, sde, sde.t0).log_prob(x) - terminal(gmm, sde)(encoded)
    np.testing.assert_allclose(ours, truth, atol=1e-6)


def test_prior_mismatch_of_vp(x64):
    """alpha(1) = e^{−B/2} = 0.0066 for VP's 0.1 → 20: with a mean of size 1, single
    log-likelihoods move by at most alpha |m| |x(t1)|, about 0.01 nats; not by 0, not by 0.1.
    """
    sde = ss.VP(t0=1e-3)
    gmm = ss.GaussianMixture(np.ones(1), np.array([[0.8, -0.6]]), np.eye(2)[None])
    x = jax.vmap(gmm.sample)(jax.random.split(jax.random.key(4), 64))
    latent = jax.vmap(lambda x: ss.gaussian_flow(gmm, sde, x, sde.t0, sde.t1))(x)
    shift = jax.vmap(lambda z: ss.prior_log_prob(sde, z) - terminal(gmm, sde)(z))(latent)
    assert float(sde.alpha(1.0)) == pytest.approx(0.0066, abs=5e-5)
    assert 0.002 < np.std(shift) < 0.02
    assert np.abs(shift).max() < 0.03


def test_likelihood_traces_once():
    chex.clear_trace_counter()

    def run(key, score, sde, x):
        return ss.log_likelihood(key, score, sde, x, num_probes=2, ts=ss.uniform_grid(sde, 4))

    traced = jax.jit(chex.assert_max_traces(run, n=1))
    params = [jnp.float32(1.0), jnp.float32(0.5)]
    score = functools.partial(jax.tree_util.Partial, lambda scale, x, t: -scale * x)
    values = [
        traced(jax.random.key(i), score(params[i]), sde, jnp.ones(3)).log_prob
        for i, sde in enumerate([ss.VP(), ss.VP(beta_max=5.0, t0=1e-3)])
    ]
    assert abs(values[0] - values[1]) > 1e-2


def test_bits_per_dim():
    """0 nats: 8 bits for 256 levels in [0, 1], 7 in [−1, 1]; D ln 2 nats are one bit less."""
    bits = functools.partial(ss.bits_per_dim, num_dims=3, num_levels=256)
    assert float(bits(0.0, data_range=(0.0, 1.0))) == pytest.approx(8.0)
    assert float(bits(0.0, data_range=(-1.0, 1.0))) == pytest.approx(7.0)
    assert float(bits(3 * np.log(2.0), data_range=(0.0, 1.0))) == pytest.approx(7.0)
    for wrong, words in (
        ({"num_levels": 1}, "`num_levels`"),
        ({"data_range": (1.0, 0.0)}, r"`data_range` must be \(low, high\) with low < high"),
        ({"num_dims": 0}, "`num_dims`"),
        ({"log_prob": 30.0}, "less than 0 bits/dim; got -6.* dequantised"),
        ({"log_prob": np.nan}, "less than 0 bits/dim; got nan"),
        ({"data_range": (0.0, np.inf)}, "`data_range`"),
        ({"data_range": 1}, "`data_range`"),
        ({"log_prob": 3}, "`log_prob` must be floating point"),
    ):
        with pytest.raises(ArgumentError, match=words):
            bits(**({"log_prob": 0.0, "data_range": (0.0, 1.0)} | wrong))


def dequantize(key, levels, num_levels):
    return ss.uniform_dequantize(key, levels, num_levels=num_levels, data_range=(0, 1))


def test_uniform_dequantisation():
    """Each level becomes uniform on its own bin of [0, 1)."""
    levels = jnp.tile(jnp.arange(17), 4_000)
    x = np.asarray(dequantize(jax.random.key(0), levels, 17), np.float64)
    assert x.min() >= 0 and x.max() < 1
    rest = 17 * x - np.asarray(levels)
    assert rest.min() > -1e-5 and rest.max() < 1 + 1e-5  # float32 at 17
    n = rest.size
    assert abs(rest.mean() - 1 / 2) < 5 / np.sqrt(12 * n)  # 5 standard errors of a uniform mean
    assert abs(rest.var() - 1 / 12) < 5 / np.sqrt(180 * n)  # and of its variance
    counts = np.histogram(rest, 10, (0, 1))[0]
    chi2 = np.sum((counts - n / 10) ** 2) / (n / 10)
    assert chi2 < 9 + 5 * np.sqrt(18)  # 9 degrees of freedom: mean 9, variance 18


@pytest.mark.parametrize(
    ("levels", "num_levels", "words"),
    [
        (jnp.array([0.5]), 17, "`levels` must be integers 0 … 16; got float32"),
        (jnp.array([0, 17]), 17, "`levels` must lie in 0 … 16"),
        (jnp.array([-1, 3]), 17, "`levels` must lie in 0 … 16"),
        (jnp.array([0]), 1, "`num_levels`"),
    ],
)
def test_bad_levels(levels, num_levels, words):
    with pytest.raises(ArgumentError, match=words):
        dequantize(jax.random.key(0), levels, num_levels)


def test_bad_arguments():
    sde, score, x = ss.VP(), lambda x, t: -x, jnp.ones(2)
    for bad, words in (
        (jnp.array([3, 4]), "`x0` must be floating point; got int32.*uniform_dequantize"),
        (jnp.array([1.0, jnp.inf]), "`x0` must be finite"),
        (jnp.zeros(0), "`x0` must not be empty"),
    ):
        with pytest.raises(ArgumentError, match=words):
            ss.exact_log_likelihood(score, sde, bad)
        with pytest.raises(ArgumentError, match=words):
            ss.log_likelihood(jax.random.key(0), score, sde, bad)
    with pytest.raises(ArgumentError, match="`key` must be a typed key"):
        ss.log_likelihood(jnp.zeros(2, jnp.uint32), score, sde, x)
    with pytest.raises(ArgumentError, match="`num_probes`"):
        ss.log_likelihood(jax.random.key(0), score, sde, x, num_probes=0)
    with pytest.raises(ArgumentError, match="`terminal_log_prob` must return a scalar"):
        ts = ss.uniform_grid(sde, 2)
        ss.exact_log_likelihood(score, sde, x, ts=ts, terminal_log_prob=lambda x: x)
    with pytest.raises(ArgumentError, match="`rtol` must be at least"):
        ss.exact_log_likelihood(score, sde, x, rtol=1e-12)
    with pytest.raises(ArgumentError, match="`stop` must not be given"):
        ss.exact_log_likelihood(score, sde, x, stop=0.5)
    with pytest.raises(ArgumentError, match="`probes` must draw v with"):
        unit = lambda key, num, shape: ss.sphere_probes(key, num, shape) / np.sqrt(2.0)
        ss.log_likelihood(jax.random.key(0), score, sde, x, probes=unit)
    with pytest.raises(ArgumentError, match="`terminal_log_prob` must return a scalar"):
        ss.log_likelihood_bound(jax.random.key(0), score, sde, x, terminal_log_prob=lambda x: x)
    with pytest.raises(ArgumentError, match="`sde` must be an SDE"):
        ss.sample_with_log_likelihood(jax.random.key(0), score, object(), (2,))


def test_numpy_data_of_double_precision_are_taken():
    """float64 numpy in a float32 process is float32, without a warning (an error here)."""
    x = np.array([0.3, -0.2])
    out = ss.exact_log_likelihood(lambda x, t: -x, ss.VP(), x, rtol=1e-3, atol=1e-3)
    assert out.log_prob.dtype == jnp.float32
    # s = −x is the score of N(0, I), which VP keeps: log p = −½|x|² − ln 2π.
    np.testing.assert_allclose(out.log_prob, -0.5 * np.sum(x**2) - np.log(2 * np.pi), rtol=1e-4)


def test_eight_bits_dequantise_inside_their_bins():
    """uint8 has no 256 to compare with, and (255 + u)/256 may round up to 1 in float32."""
    levels = np.repeat(np.array([0, 200, 255], np.uint8), 1_000_000)
    x = np.asarray(dequantize(jax.random.key(3), levels, 256))
    assert x.min() >= 0.0 and x.max() < 1.0
    # A draw within 2^-17 of a bin's end may round into the next: some 8 in a million.
    assert np.mean(np.floor(256 * x) != levels) < 3e-5
    with pytest.raises(ArgumentError, match="`levels` must lie in 0 … 16; got uint8"):
        dequantize(jax.random.key(3), levels, 17)


def test_a_grid_must_span_the_times_of_the_sde():
    """The prior is the law at t1, and the value is log p_t0."""
    sde, score = ss.VP(), lambda x, t: -x
    for ts, words in (
        ([0.5, 1e-5], r"`ts\[0\]` must be t1 = 1"),
        ([1.0, 0.1], "must be t0 = 1e-05"),
    ):
        with pytest.raises(ArgumentError, match=words):
            ss.exact_log_likelihood(score, sde, jnp.ones(2), ts=jnp.array(ts))
    with pytest.raises(ArgumentError, match=r"`ts\[0\]` must be t1 = 1.*give x there as `init`"):
        ss.sample(jax.random.key(0), score, sde, (2,), ts=jnp.array([0.5, 0.1]))
    with pytest.raises(ArgumentError, match="`ts` must not be given with `rtol` or `atol`"):
        ss.exact_log_likelihood(score, sde, jnp.ones(2), ts=ss.uniform_grid(sde, 3), rtol=1e-3)


def test_the_interval_is_student_s():
    low, high = ss.confidence_interval(2.0, 0.5, 16, confidence=0.9)
    np.testing.assert_allclose((low, high), scipy.stats.t.interval(0.9, 15, loc=2.0, scale=0.5))
    with pytest.raises(ArgumentError, match="`confidence` must lie between 0 and 1; got 95"):
        ss.confidence_interval(2.0, 0.5, 16, confidence=95)


@pytest.mark.parametrize("name", ["VP", slow("VE"), slow("SubVP")])
def test_the_bound_and_the_flow_agree_for_the_exact_score(name):
    """Both means are that of log p_t0(x_t0), for 2,000 data: within 3 standard errors of each
    other, of the exact entropy's estimate too. No order is implied for another score.
    """
    sde, gmm, count = SDES[name], ss.GaussianMixture(*mixture()), 2_000
    score, end = ss.exact_score(gmm, sde), terminal(gmm, sde)
    x0 = jax.vmap(gmm.sample)(jax.random.split(jax.random.key(1), count))

    @jax.jit
    @jax.vmap
    def run(keys, x0):
        x_t0, _ = ss.perturb(keys[0], sde, x0, sde.t0)
        flow = ss.exact_log_likelihood(score, sde, x_t0, terminal_log_prob=end, rtol=1e-4)
        bound = ss.log_likelihood_bound(keys[1], score, sde, x0, terminal_log_prob=end)
        return bound, flow.log_prob, ss.marginal(gmm, sde, sde.t0).log_prob(x_t0)

    bound, flow, truth = run(jax.random.split(jax.random.key(2), (count, 2)), x0)
    difference = np.asarray(bound.log_prob - flow, np.float64)
    stderr = difference.std(ddof=1) / np.sqrt(count)
    print(f"{name}: bound − flow = {difference.mean():.4f} ± {stderr:.4f} nats")
    assert abs(difference.mean()) < 3 * stderr < 0.2
    np.testing.assert_allclose(flow, truth, atol=2e-2)  # the solver, at 1e-4 in float32
    # Its own error bar over the draws for one example: an upper estimate, as times are stratified.
    again = jax.jit(jax.vmap(lambda key: ss.log_likelihood_bound(key, score, sde, x0[0])))
    one = again(jax.random.split(jax.random.key(6), 400))
    assert 0.5 < np.std(one.log_prob) / np.sqrt(np.mean(one.stderr**2)) < 1.1


def test_what_a_wrong_score_costs_the_bound(x64):
    """For s = (1 + δ) ∇log p_t of N(0, v I), −½ δ² ∫ g² d/(alpha² v + sigma²) dt, by quadrature;
    draws at the same times and noise leave 5 standard errors of their mean.
    """
    sde, v, delta, count = SDES["VP"], 0.25, 0.3, 2_000
    exact = lambda x, t: -x / (sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2)

    @jax.jit
    @jax.vmap
    def run(key, x0):
        scores = exact, lambda x, t: (1.0 + delta) * exact(x, t)
        return [
            ss.log_likelihood_bound(jax.random.clone(key), s, sde, x0, num_draws=32).log_prob
            for s in scores
        ]

    keys, data_key = jax.random.split(jax.random.key(3), count), jax.random.key(4)
    right, wrong = run(keys, np.sqrt(v) * jax.random.normal(data_key, (count, 2)))
    cost = np.asarray(wrong - right)
    t = np.geomspace(sde.t0, sde.t1, 20_001)
    rate = sde.diffusion(t) ** 2 * 2 / (sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2)
    expected = -0.5 * delta**2 * np.trapezoid(rate, t)
    assert abs(cost.mean() - expected) < 5 * cost.std() / np.sqrt(count)
    assert cost.std() / np.sqrt(count) < 0.02 * abs(expected)


def test_the_likelihood_accumulated_while_sampling(x64):
    """The sample is `sample_ode`'s, and its log-density the oracle's: the probes √d e_i give the
    exact trace.
    """
    sde, gmm, key = SDES["VP"], oracle(2), jax.random.key(5)
    score = ss.exact_score(gmm, sde)
    options = {"rtol": 1e-8, "atol": 1e-8, "terminal_log_prob": terminal(gmm, sde)}
    basis = lambda key, num, shape: jnp.tile(np.sqrt(2.0) * jnp.eye(2), (num // 2, 1))
    out = ss.sample_with_log_likelihood(
        key, score, sde, (2,), num_probes=2, probes=basis, **options
    )
    x = ss.sample_ode(jax.random.clone(key), score, sde, (2,), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(out.x, x, atol=1e-6)  # both within the tolerance
    truth = ss.marginal(gmm, sde, sde.t0).log_prob(out.x)
    np.testing.assert_allclose(out.likelihood.log_prob, truth, atol=1e-6)
    encoded = ss.probability_flow(score, sde, out.x, start=sde.t0, stop=sde.t1, rtol=1e-8)
    np.testing.assert_allclose(out.likelihood.latent, encoded, atol=1e-4)


def test_spherical_interpolation_keeps_the_law(x64):
    """The arc between codes of N(0, I) has mean square 1 at every weight, the line ½ in the
    middle; ends, a quarter of a circle and nearly equal codes in closed form.
    """
    x, y = jax.random.normal(jax.random.key(0), (2, 2_000, 64))
    between = jax.vmap(ss.spherical_interpolation, (0, 0, None))
    for weight in (0.0, 0.3, 0.5, 1.0):
        values = np.asarray(between(x, y, weight)).ravel()
        # The 2,000 norms are known to 1/√(2 · 2,000 · 64) each way.
        assert abs(np.mean(values**2) - 1.0) < 5 * np.sqrt(2.0 / values.size)
    np.testing.assert_allclose(between(x, y, 1.0), y, rtol=1e-12)
    a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    quarter = ss.spherical_interpolation(a, b, 1 / 3)
    np.testing.assert_allclose(quarter, [np.sqrt(3.0), 1.0], rtol=1e-12)
    np.testing.assert_allclose(ss.spherical_interpolation(a, a, 0.4), a, rtol=1e-12)


def test_codes_do_not_depend_on_the_network():
    """Two networks of other width and key encode 500 points alike, and like the exact score: each
    coordinate correlates above 0.99 (Song et al. 2021, sec. 4.3).
    """
    sde, gmm = ss.VP(t0=1e-3), ss.GaussianMixture(*mixture())
    x = jax.vmap(gmm.sample)(jax.random.split(jax.random.key(0), 10_500))
    one = functools.partial(ss.probability_flow, start=sde.t0, stop=sde.t1)
    encode = jax.jit(jax.vmap(one, (None, None, 0)))
    codes = [encode(ss.exact_score(gmm, sde), sde, x[:500])]
    for width in (32, 64):
        init_key, batch_key, fit_key = jax.random.split(jax.random.key(width), 3)
        net, rate = ss.nets.MLP(width, 2), optax.cosine_decay_schedule(5e-3, 1_500)
        score = lambda params, net=net: ss.score_from_preconditioned(  # noqa: E731
            sde, Partial(net.apply, params), sigma_data=1.0
        )
        loss = lambda params, key, batch, score=score: ss.dsm_loss(  # noqa: E731
            key, score(params), sde, batch, times=ss.likelihood_times, weight=ss.likelihood_weight
        )
        params, batches = net.init(init_key, x[0], 0.0), ss.data.batches(batch_key, x[500:], 256)
        state, _ = ss.fit(fit_key, loss, params, optax.adam(rate), batches, num_steps=1_500)
        codes.append(encode(score(state.ema_params), sde, x[:500]))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for axis in range(2):
            pair = codes[first][:, axis], codes[second][:, axis]
            assert np.corrcoef(*pair)[0, 1] > 0.99
