"""The mean log-likelihood of a data set: its interval, its budget, and what happens on the way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from jax.tree_util import Partial

import sde_score as ss
from sde_score._checks import ArgumentError

SDE = ss.VP(t0=1e-3)
TO_MODEL = Partial(ss.uniform_dequantize, num_levels=4, data_range=(-1.0, 1.0))


def data(count=40):
    gmm = ss.GaussianMixture(*mixture())
    return jax.vmap(gmm.sample)(jax.random.split(jax.random.key(0), count)), gmm


def test_the_mean_its_interval_and_its_budget():
    """With the exact score and trace: the oracle's own mean, up to the prior's mismatch and the
    tolerance; a quarter of the data's squared norm falls to alpha²; no probes, no levels.
    """
    x, gmm = data()
    out = ss.dataset_log_likelihood(
        jax.random.key(1), ss.exact_score(gmm, SDE), SDE, x, num_probes=None, chunk_size=16
    )
    truth = np.asarray(jax.vmap(ss.marginal(gmm, SDE, SDE.t0).log_prob)(x), np.float64)
    assert abs(out.mean - truth.mean()) < 1e-3
    assert out.stderr == pytest.approx(truth.std(ddof=1) / np.sqrt(40), rel=1e-2)
    interval = ss.confidence_interval(out.mean, out.stderr, 40)
    np.testing.assert_allclose(out.interval, interval)
    assert interval[1] - interval[0] == pytest.approx(2 * 2.0227 * out.stderr, rel=1e-4)
    ratio = SDE.alpha(1.0) / SDE.sigma(1.0)
    expected = 0.5 * ratio**2 * np.mean(np.sum(np.asarray(x) ** 2, axis=1))
    assert out.budget.prior == pytest.approx(float(expected), rel=1e-5)
    assert out.budget.probes == 0 and out.budget.dequantization == 0
    loose = jax.vmap(
        lambda x: ss.exact_log_likelihood(ss.exact_score(gmm, SDE), SDE, x, rtol=1e-4, atol=1e-4)
    )(x).log_prob
    moved = abs(float(np.mean(np.asarray(loose, np.float64) - out.log_probs)))
    assert out.budget.tolerance == pytest.approx(moved, rel=0.1, abs=2e-6)
    # log p_t0 − log p_0 of the oracle, of which the budget's change of t0 is some three times.
    shift = abs(float(jnp.mean(jax.vmap(gmm.log_prob)(x))) - truth.mean())
    assert 1.5 < out.budget.truncation / shift < 5
    assert out.num_evals > 20


@pytest.mark.slow
def test_probes_and_dequantisation_are_told_apart():
    """Their shares against the spread of single passes: integers on four levels, 4 probes and 8
    passes. The shares are estimates of standard errors, 40 examples × 8 passes behind each.
    """
    levels = jax.random.randint(jax.random.key(2), (40, 2), 0, 4)
    score = ss.exact_score(ss.GaussianMixture(*mixture()), SDE)
    run = functools.partial(
        ss.dataset_log_likelihood,
        score_fn=score,
        sde=SDE,
        data=levels,
        dequantize=TO_MODEL,
        num_passes=8,
        chunk_size=40,
        rtol=1e-3,
        atol=1e-3,
    )
    out = run(jax.random.key(3), num_probes=4)
    exact = run(jax.random.key(3), num_probes=None)
    # The same dequantisations: the difference is the probes' alone.
    difference = out.log_probs - exact.log_probs
    within = out.budget.probes * np.sqrt(40)
    # 40 differences, of kurtosis about 6 as their variances differ: 18 % each in three deviations
    assert difference.std() == pytest.approx(within, rel=0.35)
    assert exact.budget.probes == 0 and out.log_probs.shape == (40,)
    # Other dequantisations: the difference of two runs is theirs alone.
    other = run(jax.random.key(4), num_probes=None)
    between = (other.log_probs - exact.log_probs).std() / np.sqrt(2.0)
    share = exact.budget.dequantization * np.sqrt(40)
    assert between == pytest.approx(share, rel=0.35)
    # With probes, their variance is taken off that of the passes.
    assert out.budget.dequantization == pytest.approx(exact.budget.dequantization, rel=0.7)
    assert out.budget.dequantization < out.budget.probes + exact.budget.dequantization
    bits = ss.bits_per_dim(out.mean, 2, num_levels=4, data_range=(-1.0, 1.0))
    assert bits > 2  # uniform integers of 4 levels: no model is below 2 bits
    one_pass = run(jax.random.key(3), num_probes=1, num_passes=1)
    assert np.isnan(one_pass.budget.probes) and np.isnan(one_pass.budget.dequantization)


def test_another_terminal_density_leaves_the_prior_unknown_and_chunks_do_not_matter():
    x, gmm = data(8)
    end = ss.marginal(gmm, SDE, SDE.t1).log_prob
    run = functools.partial(
        ss.dataset_log_likelihood, jax.random.key(1), ss.exact_score(gmm, SDE), SDE, x
    )
    seen = []
    progress = lambda done, total, seconds: seen.append((done, total))
    with jax.debug_key_reuse(False):  # the same key on purpose
        out = run(terminal_log_prob=end, num_probes=2, chunk_size=3, progress=progress)
        again = run(terminal_log_prob=end, num_probes=2)
    assert np.isnan(out.budget.prior) and seen == [(3, 8), (6, 8), (8, 8)]
    np.testing.assert_allclose(out.log_probs, again.log_probs, atol=1e-4)  # the tolerance


def test_finished_chunks_are_kept():
    """The fourth example's score is not finite: its chunk fails, the first one is kept."""
    x = jnp.concatenate([jnp.ones((3, 2)), 50.0 * jnp.ones((1, 2))])
    spoiled = lambda x, t: jnp.where(jnp.max(jnp.abs(x)) > 20.0, jnp.nan, -x)
    with pytest.raises(ss.ChunkError, match="Examples 2 to 3 of 4 failed") as info:
        ss.dataset_log_likelihood(
            jax.random.key(0), spoiled, SDE, x, chunk_size=2, rtol=1e-3, atol=1e-3
        )
    log_probs = info.value.finished[0]
    # s = −x is the score of N(0, I), which VP keeps.
    np.testing.assert_allclose(log_probs, np.full(2, -1.0 - np.log(2 * np.pi)), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": jnp.ones((4, 2), jnp.int32)}, "integers have no density.*dequantize"),
        ({"data": jnp.ones((4, 2)), "dequantize": TO_MODEL}, "must be integers where they are"),
        ({"data": jnp.full((4, 2), 4), "dequantize": TO_MODEL}, "must lie in 0 … 3"),
        ({"data": jnp.ones((1, 2))}, "at least two examples"),
        ({"data": jnp.full((4, 2), jnp.nan)}, "`data` must be finite"),
        ({"ts": jnp.array([1.0, 1e-3])}, "`ts` must not be given: the budget"),
        ({"rtol": None}, "`rtol` must be a number; got None"),
        ({"num_passes": 0}, "`num_passes`"),
        ({"num_probes": 0}, "`num_probes`"),
        ({"confidence": 95}, "`confidence` must lie between 0 and 1"),
        ({"rtol": 1e-12}, "`rtol` must be at least"),
        ({"sde": object()}, "`sde` must be an SDE"),
    ],
)
def test_bad_arguments(change, words):
    given = {"score_fn": lambda x, t: -x, "sde": SDE, "data": jnp.ones((4, 2))} | change
    with pytest.raises(ArgumentError, match=words):
        ss.dataset_log_likelihood(jax.random.key(0), **given)


@pytest.mark.slow
def test_an_sde_of_another_type_is_moved_too(x64):
    """The truncation term needs dataclasses.replace alone."""
    x, gmm = data(4)
    for sde in (ss.VE(sigma_min=0.05, t0=1e-3), ss.SubVP(t0=1e-2)):
        noisier = dataclasses.replace(
            sde,
            t0=float(
                ss.time_of_log_snr(sde, ss.log_snr(sde, jnp.asarray(sde.t0)) - 2 * np.log(2.0))
            ),
        )
        out = ss.dataset_log_likelihood(
            *(jax.random.key(0), ss.exact_score(gmm, sde), sde, x),
            **{"num_probes": None, "rtol": 1e-8, "atol": 1e-8},
        )
        means = [np.mean(jax.vmap(ss.marginal(gmm, s, s.t0).log_prob)(x)) for s in (sde, noisier)]
        assert out.budget.truncation == pytest.approx(float(abs(means[1] - means[0])), rel=0.05)
