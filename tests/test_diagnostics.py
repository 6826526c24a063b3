"""Diagnoses against closed forms, planted faults and what chance alone does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import mixture
from jax.tree_util import Partial
from matplotlib.figure import Figure

import sde_score as ss
from experiments import diagnose as doctor
from sde_score import plots
from sde_score.diagnostics import _mean_square

SDES = {"vp": ss.VP(t0=1e-2), "subvp": ss.SubVP(t0=1e-2), "ve": ss.VE(sigma_max=5.0)}
X = np.array([0.4, -0.3])
CONFIG = doctor.Config(num_levels=16)
TS = ss.log_snr_grid(CONFIG.sde, 15)


@jax.jit
def run(key, score_fn, sde, x, true_score):
    return ss.diagnose(key, score_fn, sde, x, true_score=true_score)


@pytest.fixture(scope="module")
def gmm():
    return ss.GaussianMixture(*mixture())


@pytest.fixture(scope="module")
def found(gmm):
    """Diagnoses of the exact score and of each planted fault, and 8192 examples."""
    x = jax.vmap(gmm.sample)(jax.random.split(jax.random.key(1), 8192))
    truth = ss.exact_score(gmm, CONFIG.sde)
    return {
        name: run(jax.random.key(0), doctor._planted(gmm, CONFIG, *fault), CONFIG.sde, x, truth)
        for name, fault in doctor._faults(CONFIG).items()
    }


def in_errors(estimate, expected=0.0):
    return np.asarray((estimate.value - expected) / estimate.stderr)


def scaled(factor, score_fn, x, t):
    return factor * score_fn(x, t)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_fokker_planck_residual(x64, sde):
    """0 for the exact score; for c times it −½ g² (c² − c) ∇‖s‖². √d e_i as probes are exact."""
    gmm, t = ss.GaussianMixture(*mixture(np.float64)), 0.4
    probes = np.sqrt(2.0) * np.eye(2) if isinstance(sde, ss.VP) else None

    @jax.jit
    def terms(c):
        score = Partial(scaled, c, ss.exact_score(gmm, sde))
        change = jax.jvp(lambda t: score(X, t), (t,), (1.0,))[1]
        square = jax.grad(lambda x: jnp.sum(score(x, t) ** 2))(X)
        return ss.fokker_planck_residual(score, sde, X, t, probes=probes), change, square

    exact, change, square = terms(1.0)
    np.testing.assert_allclose(exact, 0.0, atol=1e-12 * np.abs(change).max())
    c = 1.1
    expected = -0.5 * sde.diffusion(t) ** 2 * (c**2 - c) * square
    np.testing.assert_allclose(terms(c)[0], expected, rtol=1e-9)


def test_the_mean_square_of_noisy_residuals_has_no_bias():
    """Of k residuals r + noise it is ‖r‖² in the mean, which the square of their mean is not."""
    noise = jax.random.normal(jax.random.key(0), (20_000, 3, 2))
    values = jax.vmap(_mean_square)(jnp.array([[[1.0, 2.0]]]) + noise)
    stderr = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - 5.0) < 4 * stderr < 0.1  # the bias would be 2/3


@jax.jit
def run_linear(slope, sde, x):
    ts = jnp.array([sde.t1, 0.5 * sde.t1, 0.1 * sde.t1])
    truth = lambda x, t: -x / (2.0 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
    score = lambda x, t: slope * truth(x, t)
    return ss.diagnose(jax.random.key(0), score, sde, x, ts=ts, true_score=truth, num_waves=1)


@pytest.mark.parametrize("sde", [SDES["vp"], SDES["ve"]], ids=["vp", "ve"])
def test_every_number_of_a_normal(sde):
    """x_0 ~ N(0, 2I), so p_t = N(0, v I), v = 2 alpha² + sigma², and s = −c x/v. Images, too."""
    x = np.sqrt(2.0) * jax.random.normal(jax.random.key(2), (2048, 3, 1))
    c = 1.3
    got = run_linear(c, sde, x)
    sigma = np.asarray(sde.sigma(got.times))
    v = 2.0 * np.asarray(sde.alpha(got.times)) ** 2 + sigma**2
    expected = {
        "gain": 1.0 / c * np.ones(3),
        "objective": sigma**2 * (0.5 * c**2 - c) / v,
        "fisher": sigma**2 * (c - 1) ** 2 / v,
        "bound": sigma**2 * (c - 1) ** 2 / v / (1 + 0.5e-3),  # the ridge, for s and x are one
        "fokker_planck": (sigma**2 / v) ** 2 * (c - 1) ** 2,
    }
    for name, value in expected.items():
        errors = in_errors(getattr(got, name), value)
        assert np.abs(errors).max() < 4.0, (name, errors)
        assert (getattr(got, name).stderr / np.abs(value)).max() < 0.2, name
    size = sigma / np.sqrt(v) * (c - 1)  # 4 errors of 3 %, and of the fields' sizes 1 %
    np.testing.assert_allclose(got.stein.value[:, 0], size, rtol=0.15)
    np.testing.assert_allclose(got.stein.value[:, 1], -size, rtol=0.15)
    # but for a floor of a few roundings under the standard error
    z = got.stein.value / got.stein.stderr
    np.testing.assert_allclose(got.z_scores, z, rtol=0.05)
    assert got.suspect.all()


def test_a_score_that_vanishes_or_fails_is_suspect():
    sde, x = SDES["vp"], np.sqrt(2.0) * jax.random.normal(jax.random.key(2), (2048, 3, 1))
    nothing = run_linear(0.0, sde, x)
    assert nothing.suspect.all() and np.isfinite(nothing.bound.value).all()
    assert np.isnan(nothing.gain.value).all()  # no multiple of 0 is nearest
    assert run_linear(np.nan, sde, x).suspect.all()
    assert "nan" in ss.summarize_diagnosis(nothing)


def test_an_exact_score_is_left_alone(found):
    """Every field, gain and bound within 3 standard errors at every level; rounding, in float32,
    in what is exactly 0.
    """
    got = found["exact"]
    assert not got.suspect.any()
    assert np.abs(got.z_scores).max() < 3.0 and np.abs(in_errors(got.gain, 1.0)).max() < 3.0
    assert in_errors(got.bound).max() < 3.0
    assert got.fisher.value.max() < 1e-12 and got.fokker_planck.value.max() < 1e-11
    assert ss.summarize_diagnosis(got).startswith("No level is suspect")


@pytest.mark.parametrize("fault", ["factor", "floor", "band"])
def test_planted_faults_are_found_where_they_are(found, fault):
    """At every faulty level, and nowhere else: there within 3 standard errors."""
    got, wrong = found[fault], doctor._is_wrong(CONFIG, TS, *doctor._faults(CONFIG)[fault])
    np.testing.assert_array_equal(got.suspect, wrong)
    assert wrong.any() and np.abs(got.z_scores)[~wrong].max(initial=0.0) < 3.0
    # what is found without the truth lies below what is, and is a good part of it
    stderr = np.hypot(got.bound.stderr, got.fisher.stderr)
    assert ((got.bound.value - got.fisher.value) / stderr).max() < 3.0
    assert (got.bound.value > 0.3 * got.fisher.value)[wrong].all()
    if fault == "factor":
        assert np.abs(in_errors(got.gain, 1 / 1.1)).max() < 3.0
    if fault == "floor":  # too flat
        assert (in_errors(got.gain, 1.0)[wrong] > 5.0).all()
    times = np.asarray(got.times)[wrong]
    line, residual = ss.summarize_diagnosis(got).split("\n")
    assert line.startswith(f"t in [{times[-1]:.2g}, {times[0]:.2g}]: off by ")
    assert residual.startswith("Fokker–Planck residual: at most ")


def test_a_diagnosis_in_words(found):
    """Two runs of suspect levels, each by its worst."""
    suspect = np.isin(np.arange(16), [0, 1, 15])
    gain = ss.metrics.Estimate(np.linspace(0.8, 1.2, 16), np.full(16, 0.01))
    lines = ss.summarize_diagnosis(found["factor"]._replace(suspect=suspect, gain=gain))
    first, second, _ = lines.split("\n")
    assert first.startswith("t in [0.92, 1]") and "0.800 ± 0.010" in first
    assert second.startswith("t in [1e-05, 1e-05]") and "1.200 ± 0.010" in second


def test_false_alarms_are_as_rare_as_promised(gmm):
    """Of 40 exact scores 1 % may be accused; 5120 correlated z of unit variance, few above 3."""
    truth = doctor._planted(gmm, CONFIG, *doctor._faults(CONFIG)["exact"])

    @jax.jit
    def alarm(truth, key):
        data_key, run_key = jax.random.split(key)
        x = jax.vmap(gmm.sample)(jax.random.split(data_key, 1024))
        got = ss.diagnose(run_key, truth, CONFIG.sde, x)
        return got.z_scores, got.suspect.any(), got.bound.value / got.bound.stderr

    z, alarmed, bound = jax.lax.map(partial(alarm, truth), jax.random.split(jax.random.key(3), 40))
    assert alarmed.sum() <= 2  # P = 0.8 % for more
    assert 0.9 < z.std() < 1.1 and (np.abs(z) > 3).mean() < 0.006
    assert bound.max() < 3.0


def test_random_traces_find_the_same():
    """By 2 signs each, of a correlated normal: the exact score is cleared, 1.3 times it is not."""
    turn = np.float32([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(np.float32(2.0))
    variances, sde = np.float32([3.0, 0.5]), SDES["vp"]

    @jax.jit
    def by_signs(c, x):
        score = lambda x, t: (
            -c * turn @ (turn @ x / (variances * sde.alpha(t) ** 2 + sde.sigma(t) ** 2))
        )
        return ss.diagnose(
            jax.random.key(4), score, sde, x, ts=TS[6:12:2], num_probes=2, num_waves=1
        )

    x = np.sqrt(variances)[None] * np.asarray(jax.random.normal(jax.random.key(5), (2048, 2)))
    exact, longer = (by_signs(c, x @ turn) for c in (1.0, 1.3))
    assert exact.fisher is None and not exact.suspect.any() and longer.suspect.all()
    for got, gain in ((exact, 1.0), (longer, 1 / 1.3)):
        assert np.abs(in_errors(got.gain, gain)).max() < 3.0 and got.gain.stderr.max() < 0.05


def test_the_plot_shows_the_numbers(found):
    got = found["band"]
    axes = plots.diagnosis(got)
    assert axes.shape == (3,)
    z, threshold = (line.get_ydata() for line in axes[0].get_lines()[:2])
    np.testing.assert_array_equal(z, np.abs(got.z_scores).max(1))
    np.testing.assert_array_equal(threshold, 2 * [float(got.threshold)])
    np.testing.assert_array_equal(axes[1].get_lines()[0].get_ydata(), got.gain.value)
    bound = axes[2].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(np.isfinite(bound), got.suspect)  # noise is not shown
    assert len(axes[0].patches) == got.suspect.sum()
    inside = [
        p.get_x() < s < p.get_x() + p.get_width()
        for p in axes[0].patches
        for s in got.log_snr[got.suspect]
    ]
    assert sum(inside) == got.suspect.sum()
    own = Figure().subplots(3, 2)[:, 0]
    assert plots.diagnosis(got._replace(fisher=None), axes=own) is own
    with pytest.raises(ValueError, match=r"`axes` must have shape \(3,\)"):
        plots.diagnosis(got, axes=own[:2])


def test_bad_inputs():
    score, sde, x = lambda x, t: -x, SDES["vp"], np.zeros((20, 2), np.float32)
    check = partial(ss.diagnose, jax.random.key(0), score, sde)
    for words, call in (
        ("`len\\(x\\)` must be .* at least 10", lambda: check(x[:5])),
        ("`x` must be finite", lambda: check(x + np.nan)),
        ("`num_probes` must be .* at least 2", lambda: check(x, num_probes=1)),
        ("`num_waves` must be .* at least 1", lambda: check(x, num_waves=0)),
        ("`ts` must decrease", lambda: check(x, ts=np.array([0.1, 0.5]))),
        ("`true_score` must return", lambda: check(x, true_score=lambda x, t: x[:1])),
        ("`t` must lie in", lambda: ss.fokker_planck_residual(score, sde, x[0], 2.0)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_field_x_is_unbiased_in_many_dimensions():
    """With its own example in the centre, each z of an exact score would move by √(d/2n) = 2.2
    here, at half signal: the mean of 8 keys tells by 6 errors. Two signs are exact for s = −x.
    """
    dim, count, score = 1000, 100, lambda x, t: -x
    run = jax.jit(
        lambda key, x: ss.diagnose(
            key, score, SDES["vp"], x, ts=jnp.array([0.4, 0.3]), num_probes=2, num_waves=1
        ).z_scores[:, 1]
    )
    keys = jax.random.split(jax.random.key(1), (8, 2))
    z = np.array([run(k, jax.random.normal(data, (count, dim))) for k, data in keys])
    assert np.abs(z.mean(axis=0)).max() < 4 / np.sqrt(8)


def test_the_threshold_is_two_sided_over_all_levels_and_fields(found):
    got = found["band"]
    assert float(got.threshold) == pytest.approx(
        scipy.stats.norm.isf(0.005 / got.z_scores.size), rel=1e-4
    )
