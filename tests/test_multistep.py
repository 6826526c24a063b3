"""Multistep methods and fitted grids against the oracle: formulas, orders, tracing, and the floor
of 10,000 samples at few evaluations.
"""

import dataclasses
import json
from fractions import Fraction
from math import factorial
from pathlib import Path

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from jax.tree_util import Partial

import sde_score as ss
from sde_score._checks import ArgumentError
from sde_score.sampling.multistep import _moments

MIXTURES = Path(__file__).parents[1] / "benchmarks" / "mixtures.json"

# Coefficients of order one: every step size below is asymptotic.
SDES = {
    "VP": ss.VP(beta_min=0.5, beta_max=4.0, t0=5e-2),
    "SubVP": ss.SubVP(beta_min=0.5, beta_max=4.0, t0=2e-1),
    "VE": ss.VE(sigma_min=0.3, sigma_max=3.0),
}
METHODS = {  # and their orders
    "dpm_solver_pp(1)": (ss.dpm_solver_pp(1), 1),
    "dpm_solver_pp(2)": (ss.dpm_solver_pp(2), 2),
    "dpm_solver_pp(3)": (ss.dpm_solver_pp(3), 3),
    "unipc(1)": (ss.unipc(1), 2),
    "unipc(2)": (ss.unipc(2), 3),
    "unipc(3)": (ss.unipc(3), 3),
    "adams(1)": (ss.adams(1, sigma_data=0.8), 2),
    "adams(2)": (ss.adams(2, sigma_data=0.8), 3),
    "adams(3)": (ss.adams(3, sigma_data=0.8), 3),
}
STEPS = np.array([24, 48, 96, 192, 384])
X = np.array([[1.3, -0.9], [-0.4, 0.8], [0.2, 1.7]])


def gaussian():
    covariance = np.array([[[0.6, 0.2], [0.2, 0.4]]])
    return ss.GaussianMixture(np.ones(1), np.array([[0.7, -0.4]]), covariance)


def published(dim):
    """One of the two benchmark mixtures, of 2 and 16 dimensions."""
    fields = json.loads(MIXTURES.read_text())[f"mixture_{dim}d"]
    return ss.GaussianMixture(**{name: np.array(values) for name, values in fields.items()})


def order(errors):
    """The slope of log error against log step size."""
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


def grid(sde, num_steps, uneven):
    """Equal steps in log-SNR, or `uneven` ones: each second one twice as long as the others, also
    in the limit.
    """
    lengths = np.where(uneven * np.arange(num_steps) % 2 == 1, 2.0, 1.0)
    position = np.concatenate([[0.0], np.cumsum(lengths) / lengths.sum()])
    lowest, highest = (ss.log_snr(sde, jnp.asarray(t)) for t in (sde.t1, sde.t0))
    ts = ss.time_of_log_snr(sde, lowest + (highest - lowest) * position)
    return np.asarray(ts.at[0].set(sde.t1).at[-1].set(sde.t0))


def padded(ts, longest=STEPS[-1]):
    """Grids of all lengths in one shape: one compilation for every number of steps."""
    return np.pad(ts, (0, longest + 1 - len(ts)), mode="edge"), len(ts) - 1


@jax.jit
def walk(method, score, sde, x, ts, num_steps):
    """A method step by step; for every order of one kind the same program."""

    def body(i, carry):
        return method.step(None, score, sde, carry[0], ts[i], ts[i + 1], carry[1])

    def one(x):
        return jax.lax.fori_loop(0, num_steps, body, (x, method.init(x)))[0]

    return jax.vmap(one)(x)


@pytest.mark.parametrize("rate_h", [1e-6, 1e-3, 0.3, 2.0, 12.0, 24.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_to_rounding(rate_h, dtype, x64):
    """m_k = ∫_0^h e^{rate(r−h)} r^k dr = h^{k+1} Σ_j (−rate h)^j k!/(k+j+1)!, in fractions."""
    for rate in (1.0, 2.0):
        h = dtype(rate_h / rate)
        scaled = -Fraction(float(h)) * Fraction(rate)
        for k, moment in enumerate(_moments(jnp.asarray(h), rate)):
            assert moment.dtype == dtype
            terms = (scaled**j * factorial(k) / factorial(k + j + 1) for j in range(150))
            exact = float(Fraction(float(h)) ** (k + 1) * sum(terms))
            # all terms are positive; rate·(r − h), up to 24, is rounded before exp
            np.testing.assert_allclose(moment, exact, rtol=100 * np.finfo(dtype).eps)
    np.testing.assert_allclose(
        _moments(jnp.float64(-0.7), 0.0), [-0.7, 0.245, -0.343 / 3, 0.060025]
    )


def data_kind(sde, score, x, t, sigma_data):
    """Clock, size of the coordinate's unit, factor of the integral, prediction."""
    x0 = (x + sde.sigma(t) ** 2 * score(x, t)) / sde.alpha(t)
    return 0.5 * ss.log_snr(sde, t), sde.sigma(t), sde.alpha(t), x0


def velocity_kind(sde, score, x, t, sigma_data):
    """From its definition: v = cos phi ẑ − sin phi x̂_0/sd."""
    phi = jnp.arctan2(sde.sigma(t), sde.alpha(t) * sigma_data)
    rho = jnp.sqrt((sde.alpha(t) * sigma_data) ** 2 + sde.sigma(t) ** 2)
    noise = -sde.sigma(t) * score(x, t)
    x0 = (x - sde.sigma(t) * noise) / sde.alpha(t)
    return phi, rho, rho, jnp.cos(phi) * noise - jnp.sin(phi) * x0 / sigma_data


def by_linear_systems(kind, rate, order, corrected, sigma_data, score, sde, x, ts):
    """Adams' methods the long way: weights that integrate 1, r, r², … exactly at their nodes, from
    Vandermonde's system; the corrector a step of its own from the previous state.
    """

    def integral(clocks, values, start, end):
        k = len(clocks)
        weights = np.linalg.solve(
            np.vander(np.array(clocks) - start, k, increasing=True).T,
            np.array(_moments(jnp.float64(end - start), rate))[:k],
        )
        return sum(w * v for w, v in zip(weights, values, strict=True))

    clocks, values, units, previous = [], [], [], x
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        clock, unit, factor, value = kind(sde, score, x, t, sigma_data)
        clocks, values, units = [clock, *clocks], [value, *values], [unit, *units]
        if len(clocks) > 1 and (corrected or len(clocks) == 2 and order == 3):
            part = integral(clocks[: order + 1], values[: order + 1], clocks[1], clock)
            x = unit / units[1] * previous + factor * part
        previous = x
        clock_s, unit_s, factor_s, _ = kind(sde, score, x, s, sigma_data)
        part = integral(clocks[:order], values[:order], clock, clock_s)
        x = unit_s / unit * x + factor_s * part
    return x


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_every_method_integrates_its_polynomials_exactly(sde, x64):
    """Along an irregular grid, against weights from linear systems, to their rounding."""
    score = Partial(jax.jit(ss.exact_score(gaussian(), sde)))
    ts = np.sort(np.random.default_rng(0).uniform(sde.t0, sde.t1, 7))[::-1]
    for k in (1, 2, 3):
        for kind, rate, corrected, method in (
            (data_kind, 1.0, False, ss.dpm_solver_pp(k)),
            (data_kind, 1.0, True, ss.unipc(k)),
            (velocity_kind, 0.0, True, ss.adams(k, sigma_data=0.8)),
        ):
            expected = by_linear_systems(kind, rate, k, corrected, 0.8, score, sde, X[0], ts)
            got = walk(method, score, sde, X[:1], *padded(ts))[0]
            np.testing.assert_allclose(got, expected, rtol=1e-10, err_msg=f"{k} {kind.__name__}")


@pytest.mark.parametrize("uneven", [slow(False), True], ids=["even", "uneven"])
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_orders_of_the_deterministic_methods(sde, uneven, x64):
    """The probability flow of one Gaussian is known in closed form. Methods of order 1 and 2 take
    twice as many steps: `adams(1)` meets its order from above, slowly.
    """
    gmm = gaussian()
    exact = jax.vmap(lambda x: ss.gaussian_flow(gmm, sde, x, sde.t1, sde.t0))(X)
    measured = {}
    for name, (method, expected) in METHODS.items():
        steps = STEPS * (2 if expected <= 2 else 1)
        grids = [padded(grid(sde, int(n), uneven), 2 * STEPS[-1]) for n in steps]
        ends = [walk(method, ss.exact_score(gmm, sde), sde, X, *ts) for ts in grids]
        measured[name] = order([np.sqrt(np.mean((x - exact) ** 2)) for x in ends])
    print({name: round(float(value), 2) for name, value in measured.items()})
    for name, (_, expected) in METHODS.items():
        assert measured[name] > expected - 0.2, (name, measured[name])
        assert expected > 2 or abs(measured[name] - expected) < 0.1, (name, measured[name])


@jax.jit
def moments_of_walk(method, score, sde, x, ts, num_steps):
    """Exact mean and covariance of the last state from the point x: a step is affine in x, in its
    memory and in its noise, so both follow from its Jacobian, without sampling.
    """
    key_a, key_b = jax.random.split(jax.random.key(0))
    z_a, z_b = (jax.random.normal(key, x.shape) for key in (key_a, key_b))
    flat, unpack = jax.flatten_util.ravel_pytree((x, method.init(x)._replace(clocks=())))

    def body(i, carry):
        mean, covariance, clocks = carry

        def move(y, key):
            x, state = unpack(y)
            state = state._replace(clocks=clocks)
            x, state = method.step(key, score, sde, x, ts[i], ts[i + 1], state)
            rest = jax.flatten_util.ravel_pytree((x, state._replace(clocks=())))[0]
            return rest, state.clocks

        (a, later), (b, _) = move(mean, key_a), move(mean, key_b)
        scale = (a - b)[: x.size] / (z_a - z_b)  # the noise enters x alone
        linear = jax.jacfwd(lambda y: move(y, key_a)[0])(mean)
        fresh = jnp.diag(jnp.pad(scale**2, (0, flat.size - x.size)))
        mean = a.at[: x.size].add(-scale * z_a)
        return mean, linear @ covariance @ linear.T + fresh, later

    start = flat, jnp.zeros((flat.size, flat.size)), method.init(x).clocks
    mean, covariance, _ = jax.lax.fori_loop(0, num_steps, body, start)
    return mean[: x.size], covariance[: x.size, : x.size]


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_sde_dpm_solver_pp_is_of_weak_order_two(sde, uneven, x64):
    """Exact moments of the discrete chain from one point: no statistical error. Those of the
    reverse SDE are p(x_t0 | x_t1), by Bayes' rule from the forward SDE, whose x_t1 given x_t0 is
    normal with mean a x_t0: m_0 + a C_0 C_1⁻¹ (x − m_1) and C_0 − a² C_0 C_1⁻¹ C_0.

    A step of Adams and Bashforth feels the noise of the step before, not its own: the covariance
    lacks a term of h² in each step and gains it in the next, so that O(h²) is left at the end. The
    mean is exact.
    """
    gmm = gaussian()
    first, last = (ss.marginal(gmm, sde, t) for t in (sde.t1, sde.t0))
    a = sde.alpha(sde.t1) / sde.alpha(sde.t0)
    gain = a * last.covariances[0] @ jnp.linalg.inv(first.covariances[0])
    mean = last.means[0] + gain @ (X[0] - first.means[0])
    covariance = last.covariances[0] - a * gain @ last.covariances[0]
    score, grids = ss.exact_score(gmm, sde), [padded(grid(sde, int(n), uneven)) for n in STEPS]
    with jax.debug_key_reuse(False):  # one draw is replayed, to take it out
        method = ss.sde_dpm_solver_pp()
        moments = [moments_of_walk(method, score, sde, X[0], *ts) for ts in grids]
    for got, _ in moments:  # along the reverse SDE x̂_0 is a martingale: its mean does not move
        np.testing.assert_allclose(got, mean, rtol=1e-10)
    value = order([np.linalg.norm(got - covariance) for _, got in moments])
    print("SDE-DPM-Solver++(2M), weak order of the covariance:", value)
    assert abs(value - 2.0) < 0.25


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_first_steps_are_known_one_step_methods(sde, x64):
    """One step of every data prediction is `ddim`; of the SDE, `ancestral`, noise included."""
    ts, score = np.array([sde.t1, 0.4]), ss.exact_score(gaussian(), sde)
    draw = jax.jit(Partial(ss.sample_multistep, ts=ts, init=X[0], finish=None), static_argnums=3)
    key = lambda: jax.random.key(0)  # noqa: E731
    for step, methods in (
        (ss.ddim, (make(k) for make in (ss.dpm_solver_pp, ss.unipc) for k in (1, 2, 3))),
        (ss.ancestral, [ss.sde_dpm_solver_pp()]),
    ):
        expected = step(jax.random.fold_in(jax.random.split(key())[1], 0), score, sde, X[0], *ts)
        for method in methods:
            got = draw(key(), score, sde, (2,), method=method)
            np.testing.assert_allclose(got, expected, 1e-12)


def test_sample_multistep_walks_the_grid_and_finishes(x64):
    sde, method = SDES["VP"], ss.adams()
    score, ts = ss.exact_score(gaussian(), sde), ss.karras_grid(sde, 7)
    run = Partial(ss.sample_multistep, method=method, ts=ts, init=X[0])
    raw = run(jax.random.key(0), score, sde, (2,), finish=None)
    np.testing.assert_allclose(raw, walk(method, score, sde, X[:1], *padded(ts))[0], 1e-12)
    finished = run(jax.random.key(0), score, sde, (2,))
    np.testing.assert_allclose(finished, ss.denoise(score, sde, raw, ts[-1]), 1e-12)
    key = jax.random.key(0)
    prior = ss.sample_prior(jax.random.split(jax.random.clone(key))[0], sde, (2,))
    drawn = ss.sample_multistep(key, score, sde, (2,), method=method, ts=ts, finish=None)
    np.testing.assert_allclose(drawn, walk(method, score, sde, prior[None], *padded(ts))[0], 1e-12)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_sde_solver_has_the_right_moments(sde):
    """20,000 draws in 50 steps, means and second moments of p_t0 within 5 standard errors; the
    bias is below a tenth of one by the weak order's errors.
    """
    gmm, count = gaussian(), 20_000
    start_key, key = jax.random.split(jax.random.key(1))
    keys = jax.random.split(start_key, count)
    start = jax.jit(jax.vmap(ss.marginal(gmm, sde, sde.t1).sample))(keys)
    ts = ss.log_snr_grid(sde, 50)

    @jax.jit
    @jax.vmap
    def draw(key, x):
        options = {"method": ss.sde_dpm_solver_pp(), "ts": ts, "init": x, "finish": None}
        return ss.sample_multistep(key, ss.exact_score(gmm, sde), sde, (2,), **options)

    end = ss.marginal(gmm, sde, sde.t0)
    mean, covariance = np.asarray(end.means[0]), np.asarray(end.covariances[0])
    x = np.asarray(draw(jax.random.split(key, count), start), np.float64) - mean
    values = np.concatenate([x, x[:, [0, 0, 1]] * x[:, [0, 1, 1]]], axis=1)
    expected = np.concatenate([[0.0, 0.0], covariance[[0, 0, 1], [0, 1, 1]]])
    z = (values.mean(0) - expected) / (values.std(0, ddof=1) / np.sqrt(count))
    assert np.abs(z).max() < 5, z


SOLVERS = {
    "dpm_solver_pp": ss.dpm_solver_pp,
    "unipc": ss.unipc,
    "adams": ss.adams,
    "sde_dpm_solver_pp": lambda order: ss.sde_dpm_solver_pp(),
}


@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
def test_a_sample_depends_on_its_key_alone_and_new_numbers_never_trace_again(make, x64):
    """Not bitwise: XLA orders the same sums otherwise in another batch size. Another order of a
    method is new numbers too.
    """
    keys = lambda: jax.random.split(jax.random.key(3), 8)  # noqa: E731

    def sample(key, method, score, sde):
        ts = ss.log_snr_grid(sde, 6)
        return ss.sample_multistep(key, score, sde, (2,), method=method, ts=ts)

    chex.clear_trace_counter()  # it counts by name
    counted = chex.assert_max_traces(sample, n=2)  # once for each batch size
    draw = jax.jit(jax.vmap(counted, in_axes=(0, None, None, None)))
    sde, gmm = SDES["VP"], gaussian()
    eight, three = (draw(k, make(2), ss.exact_score(gmm, sde), sde) for k in (keys(), keys()[:3]))
    # Roundings of 1e-16 grow by the steps' amplification, below 1e4 here.
    np.testing.assert_allclose(eight[:3], three, rtol=1e-11, atol=1e-11)
    assert len(np.unique(eight, axis=0)) == 8
    sde = dataclasses.replace(sde, beta_max=3.0, t0=6e-2)
    fresh = draw(keys(), make(3), ss.exact_score(gmm, sde), sde)
    assert np.isfinite(fresh).all() and np.abs(fresh - eight).mean() > 1e-3


def test_float32_follows_float64(x64):
    """400 short steps, where a difference of exponentials would have lost all digits of m_3."""
    sde, ts = SDES["VP"], ss.log_snr_grid(SDES["VP"], 384)
    for method in (ss.dpm_solver_pp(3), ss.unipc(3), ss.adams(3)):
        score = ss.exact_score(gaussian(), sde)
        double = walk(method, score, sde, X, *padded(ts))
        single, ts32 = X.astype(np.float32), np.asarray(ts, np.float32)
        score32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), score)
        got = walk(method, score32, sde, single, *padded(ts32))
        assert got.dtype == jnp.float32
        # 384 steps of a few roundings of 6e-8, at worst all of one sign
        np.testing.assert_allclose(got, double, rtol=1e-4, atol=1e-4)


def test_bad_arguments():
    sde, score = ss.VP(t0=1e-2), lambda x, t: -x
    for make in (ss.dpm_solver_pp, ss.unipc, ss.adams):
        with pytest.raises(ArgumentError, match="`order` must be 1, 2 or 3; got 4"):
            make(4)
        with pytest.raises(ArgumentError, match="`order` must be a Python integer"):
            make(0)
    with pytest.raises(ArgumentError, match="`sigma_data`"):
        ss.adams(sigma_data=0.0)
    for ts, words in (
        (jnp.array([0.5]), "at least two times"),
        (ss.uniform_grid(sde, 4)[::-1], "must decrease"),
        (jnp.array([1.5, 0.5]), "must lie in .t0, t1."),
        (jnp.array([0.9, 0.5]), "must be t1"),
    ):
        with pytest.raises(ArgumentError, match=words):
            key = jax.random.key(0)
            ss.sample_multistep(key, score, sde, (2,), method=ss.adams(), ts=ts)
    for name in ("num_steps", "num_samples", "num_iterations", "fine_steps"):
        options = {"num_steps": 2, "sampler": ss.sample} | {name: 0}
        with pytest.raises(ArgumentError, match=f"`{name}` must be a Python integer"):
            ss.fit_grid(jax.random.key(0), score, sde, (2,), **options)


VP = ss.VP(t0=1e-2)  # for the published mixtures


def solve(sampler, score, ts, starts):
    run = lambda ts, x: sampler(jax.random.key(0), score, VP, x.shape, ts=ts, init=x)  # noqa: E731
    return jax.jit(jax.vmap(run, (None, 0)))(ts, starts)


def fit_and_compare(sampler, score, shape, num_steps):
    """The fitted grid, and the mean squared errors of it and of the three standard ones."""
    fit_key, key = jax.random.split(jax.random.key(0))
    fit = lambda key: ss.fit_grid(key, score, VP, shape, num_steps, sampler=sampler)  # noqa: E731
    ts, starts = jax.jit(fit)(fit_key), jax.random.normal(key, (2_000, *shape))
    exact = solve(sampler, score, ss.log_snr_grid(VP, 256), starts)
    grids = [make(VP, num_steps) for make in (ss.uniform_grid, ss.log_snr_grid, ss.karras_grid)]
    errors = [
        float(jnp.mean((solve(sampler, score, grid, starts) - exact) ** 2))
        for grid in (ts, *grids)
    ]
    print("Mean squared errors, fitted grid, uniform, log-SNR, Karras:", errors)
    return ts, errors


def test_fit_grid_takes_a_one_step_method(x64):
    """DDIM on 12 fitted steps: mean squared error on starts that the fit has not seen."""
    sampler, score = (
        Partial(ss.sample, step=ss.ddim, finish=None),
        ss.exact_score(published(2), VP),
    )
    ts, errors = fit_and_compare(sampler, score, (2,), 12)
    assert ts[0] == VP.t1 and ts[-1] == VP.t0 and np.all(np.diff(ts) < 0)
    assert errors[0] < 0.75 * min(errors[1:]), errors


@pytest.mark.parametrize("dim", [2, 16])
def test_eight_evaluations_reach_the_floor_of_ten_thousand_samples(dim, x64):
    """Sliced Wasserstein-2 distances, in 128 directions, between sets of 10,000 points: between
    the samples of 8 evaluations and of 96 from the same starts below a third of that between two
    exact sets, so that from any exact set the samples are as far as another exact set is, up to a
    twentieth (the two differences are independent).
    """
    gmm, count = published(dim), 10_000
    score = ss.exact_score(gmm, VP)
    sampler = Partial(ss.sample_multistep, method=ss.adams(), finish=None)
    ts, errors = fit_and_compare(sampler, score, (dim,), 8)
    assert errors[0] < 0.25 * min(errors[1:])
    directions = np.random.default_rng(0).normal(size=(128, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def distance(a, b):
        a, b = (np.sort(directions @ np.asarray(x).T, axis=1) for x in (a, b))
        return np.sqrt(np.mean((a - b) ** 2))

    start_key, *keys = jax.random.split(jax.random.key(1), 3)
    starts = jax.random.normal(start_key, (count, dim))
    few, many = (solve(sampler, score, g, starts) for g in (ts, ss.log_snr_grid(VP, 96)))
    exact = [jax.jit(jax.vmap(gmm.sample))(jax.random.split(key, count)) for key in keys]
    bias, floor = distance(few, many), distance(*exact)
    reached = distance(few, exact[0])
    print(f"{dim}-d: {bias:.4f} from 96 evaluations, {reached:.4f} from exact; floor {floor:.4f}")
    assert bias < floor / 3
