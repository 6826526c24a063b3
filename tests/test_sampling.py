"""Samplers against the oracle: moments, determinism, tracing, grids, and each step's formula."""

import dataclasses
import functools

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow

import sde_score as ss
from sde_score._checks import ArgumentError


@ss.register_pytree
@dataclasses.dataclass(frozen=True)
class Cosine:
    """A user's own SDE in six members: alpha = cos(πt/2), sigma = sin(πt/2)."""

    t0: float = 0.02
    t1: float = 0.8

    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t)

    def sigma(self, t):
        return jnp.sin(0.5 * jnp.pi * t)

    def drift(self, x, t):
        return -0.5 * jnp.pi * jnp.tan(0.5 * jnp.pi * t) * x

    def diffusion(self, t):
        return jnp.sqrt(jnp.pi * jnp.tan(0.5 * jnp.pi * t))


# A start at t1 < 1 from the oracle's own p_t1 lets fewer steps make the bias negligible.
SDES = {
    "VP": ss.VP(t0=1e-2, t1=0.6),
    "SubVP": ss.SubVP(t0=2e-2, t1=0.6),
    "VE": ss.VE(sigma_min=0.1, sigma_max=10.0, t0=1e-2),
    "Cosine": Cosine(),
}


def stepper(step, num_steps):
    def draw(key, score_fn, sde, init=None):
        ts = ss.uniform_grid(sde, num_steps)
        return ss.sample(key, score_fn, sde, (2,), step=step, ts=ts, init=init, finish=None)

    return draw


def solver(solver, num_steps):
    def draw(key, score_fn, sde, init=None):
        ts = ss.uniform_grid(sde, num_steps)
        options = {"solver": solver, "ts": ts, "init": init, "finish": None}
        return ss.sample_sde(key, score_fn, sde, (2,), **options)

    return draw


def multistep(method, num_steps):
    def draw(key, score_fn, sde, init=None):
        options = {"ts": ss.log_snr_grid(sde, num_steps), "init": init, "finish": None}
        return ss.sample_multistep(key, score_fn, sde, (2,), method=method, **options)

    return draw


def flow(key, score_fn, sde, init=None):
    return ss.sample_ode(key, score_fn, sde, (2,), init=init, rtol=1e-4, atol=1e-4)


def samplers(first_order, second_order, ancestral):
    """Every sampler, with so many steps."""
    return {
        "euler_maruyama": stepper(ss.euler_maruyama, first_order),
        "heun": stepper(ss.heun, second_order),
        "ddim": stepper(ss.ddim, first_order),
        "ancestral": stepper(ss.ancestral, ancestral),
        "sde_euler": solver(diffrax.Euler(), first_order),
        "sde_shark": solver(diffrax.ShARK(), second_order),
        "ode": flow,
    }


SAMPLERS, SHORT = samplers(250, 40, 400), samplers(8, 4, 8)
OTHERS = {  # of the same families
    "reverse_diffusion": stepper(ss.reverse_diffusion, 400),
    "ancestral_beta": stepper(ss.ancestral_beta, 400),
    "ddim_eta": stepper(ss.ddim_eta(0.5), 400),
    "edm_stochastic": stepper(ss.edm_stochastic(0.05), 40),
    "predictor_corrector": stepper(
        ss.predictor_corrector(ss.euler_maruyama, ss.langevin(0.05)), 250
    ),
    "dpm_solver_pp": multistep(ss.dpm_solver_pp(), 40),
    "unipc": multistep(ss.unipc(), 40),
    "adams": multistep(ss.adams(), 40),
    "sde_dpm_solver_pp": multistep(ss.sde_dpm_solver_pp(), 60),
}


def oracle():
    """Three components that overlap in noise but not in data."""
    covariances = [[[0.4, 0.15], [0.15, 0.3]], [[0.3, -0.1], [-0.1, 0.5]], [[0.35, 0], [0, 0.25]]]
    return ss.GaussianMixture(
        weights=jnp.array([0.5, 0.3, 0.2]),
        means=jnp.array([[-2.0, 0.0], [2.0, 1.0], [0.5, -2.5]]),
        covariances=jnp.array(covariances),
    )


def component_moments(gmm, x):
    """r_k, r_k (x − m_k), r_k (x − m_k)(x − m_k)ᵀ with r_k = p(k | x): their expectations under
    the mixture are exactly w_k, 0, w_k C_k, whether components overlap or not.
    """
    r, y = gmm.responsibilities(x)[:, None], x[None] - gmm.means
    return jnp.concatenate([r, r * y, r * y[:, [0, 0, 1]] * y[:, [0, 1, 1]]], axis=1)


def expected_moments(gmm):
    c = gmm.covariances
    flat = jnp.stack([c[:, 0, 0], c[:, 0, 1], c[:, 1, 1]], axis=1)
    ones, zeros = jnp.ones((3, 1)), jnp.zeros((3, 2))
    return gmm.weights[:, None] * jnp.concatenate([ones, zeros, flat], axis=1)


@functools.cache
def starts(sde_name, count):
    sde, keys = SDES[sde_name], jax.random.split(jax.random.key(11), count)
    return jax.jit(jax.vmap(ss.marginal(oracle(), sde, sde.t1).sample))(keys)


@pytest.mark.parametrize("sampler", [*SAMPLERS, *(slow(name) for name in OTHERS)])
@pytest.mark.parametrize("name", ["VP", *(slow(name) for name in SDES if name != "VP")])
def test_moments_of_every_sampler_under_every_sde(name, sampler):
    """Weights, means and covariances of p_t0 within 5 standard errors.

    The largest discretisation bias over the 18 statistics, measured with 10^5 draws at 200 steps
    (30 for the second-order methods, where it vanished in the noise of 0.45): about 0.9 of these
    standard errors for Euler, 1.1 for DDIM, 2.2 for ancestral; with the steps above it is less
    by their ratio.
    """
    sde, gmm, count = SDES[name], oracle(), 20_000
    draw = jax.jit(jax.vmap((SAMPLERS | OTHERS)[sampler], in_axes=(0, None, None, 0)))
    keys = jax.random.split(jax.random.key(5), count)
    x = draw(keys, ss.exact_score(gmm, sde), sde, starts(name, count))
    final = ss.marginal(gmm, sde, sde.t0)
    values = np.asarray(jax.vmap(functools.partial(component_moments, final))(x), np.float64)
    stderr = values.std(axis=0, ddof=1) / np.sqrt(count)
    z = (values.mean(axis=0) - np.asarray(expected_moments(final))) / stderr
    report = (
        f"{name} × {sampler}, 20,000 draws: weights {values.mean(0)[:, 0].round(4)} "
        f"± {stderr[:, 0].round(4)}, largest deviation {np.abs(z).max():.2f} standard errors"
    )
    print(report)
    assert np.abs(z).max() < 5, f"{report}\nall (w, m, C) by component:\n{z.round(1)}"


@pytest.mark.parametrize("sampler", ["ode", *(slow(name) for name in SHORT if name != "ode")])
def test_sample_i_depends_on_key_i_alone_and_new_numbers_never_trace_again(sampler, x64):
    """Not bitwise: XLA orders the same sums otherwise in another batch size."""
    sde, gmm, keys = ss.VP(t0=1e-2), oracle(), lambda: jax.random.split(jax.random.key(3), 8)
    chex.clear_trace_counter()  # it counts by name
    counted = chex.assert_max_traces(SHORT[sampler], n=2)  # once for each batch size
    draw = jax.jit(jax.vmap(counted, in_axes=(0, None, None)))
    eight, three = (draw(k, ss.exact_score(gmm, sde), sde) for k in (keys(), keys()[:3]))
    # Roundings of 1e-16 grow by the steps' amplification, below 1e4 here.
    np.testing.assert_allclose(eight[:3], three, rtol=1e-11, atol=1e-11)
    assert len(np.unique(eight, axis=0)) == 8

    sde, gmm = ss.VP(beta_max=12.0, t0=2e-2), dataclasses.replace(gmm, means=gmm.means + 1.0)
    fresh = draw(keys(), ss.exact_score(gmm, sde), sde)
    assert np.abs(fresh - eight).mean() > 0.1  # the new numbers were used


def test_langevin_has_the_stationary_variance_of_its_step_size():
    """x ← (1 − ε/2) x + √ε z has variance ε/(1 − (1 − ε/2)²) = 1/(1 − ε/4); noise √(2ε) would
    double it. From uniform noise, 60 steps at ε = 0.5 leave 0.75^120 = 1e-15 of the start.
    """
    epsilon, count = 0.5, 40_000
    start_key, key = jax.random.split(jax.random.key(2))
    start = jax.random.uniform(start_key, (count,), minval=-3.0, maxval=3.0)
    draw = functools.partial(
        ss.langevin_sample, score_fn=lambda x: -x, step_size=epsilon, num_steps=60
    )
    x = jax.jit(jax.vmap(lambda key, x: draw(key, x=x)))(jax.random.split(key, count), start)
    expected = 1.0 / (1.0 - epsilon / 4.0)
    stderr = expected * np.sqrt(2.0 / count)  # of the variance of `count` normal draws
    assert abs(float(jnp.var(x)) - expected) < 5 * stderr
    assert abs(float(jnp.mean(x))) < 5 * np.sqrt(expected / count)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_grids_take_equal_steps_in_their_own_variable(sde, x64):
    for grid in (ss.uniform_grid, ss.log_snr_grid, ss.karras_grid):
        ts = grid(sde, 12)
        assert ts.shape == (13,) and np.all(np.diff(ts) < 0)
        assert ts[0] == sde.t1 and ts[-1] == sde.t0
    levels = {
        "t": ss.uniform_grid(sde, 12),
        "log-SNR": ss.log_snr(sde, ss.log_snr_grid(sde, 12)),
        "rho-th root": jnp.exp(-0.5 * ss.log_snr(sde, ss.karras_grid(sde, 12, rho=5.0)) / 5.0),
    }
    for name, values in levels.items():
        steps = np.diff(values)
        # Bisection to 2^-70 of [t0, t1]: float64 rounding of log alpha remains.
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-9, err_msg=name)


def test_grids_are_refused_by_name():
    sde, score = ss.VP(t0=1e-2), lambda x, t: -x
    for grid in (ss.uniform_grid, ss.log_snr_grid, ss.karras_grid):
        with pytest.raises(ArgumentError, match="`num_steps`.*at least 1; got 0"):
            grid(sde, 0)
    with pytest.raises(ArgumentError, match="`rho`"):
        ss.karras_grid(sde, 3, rho=0.0)
    for ts, words in (
        (ss.uniform_grid(sde, 4)[::-1], "must decrease"),
        (np.array([1.0, 1.0 - 1e-9, 0.5]), "must decrease"),  # equal in float32
        (jnp.array([1.5, 0.5]), "must lie in .t0, t1."),
        (jnp.array([0.5]), "at least two times"),
    ):
        for run in (ss.sample, ss.sample_sde, ss.sample_ode):
            with pytest.raises(ArgumentError, match=words):
                run(jax.random.key(0), score, sde, (2,), ts=ts)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_ddim_is_the_exponential_euler_step(sde, x64):
    """x_s = (alpha_s/alpha_t) x_t + (sigma_s − sigma_t alpha_s/alpha_t) ẑ, which is the exact
    flow for data at a point: u = x/alpha moves by ẑ d(sigma/alpha).
    """
    t, s = jnp.float64(0.5), jnp.float64(0.2)
    point, x = jnp.array([0.3, -1.2]), jnp.array([0.8, 0.1])
    of_a_point = lambda x, t: (sde.alpha(t) * point - x) / sde.sigma(t) ** 2  # noqa: E731
    exact = sde.alpha(s) * point + sde.sigma(s) / sde.sigma(t) * (x - sde.alpha(t) * point)
    key = jax.random.key(0)
    for step in (ss.ddim, ss.heun):  # the noise is constant along this flow, so both are exact
        np.testing.assert_allclose(step(key, of_a_point, sde, x, t, s), exact, rtol=1e-12)

    gmm = oracle()
    noise = -sde.sigma(t) * ss.exact_score(gmm, sde)(x, t)
    ratio = sde.alpha(s) / sde.alpha(t)
    formula = ratio * x + (sde.sigma(s) - sde.sigma(t) * ratio) * noise
    np.testing.assert_allclose(
        ss.ddim(key, ss.exact_score(gmm, sde), sde, x, t, s), formula, rtol=1e-12
    )


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_ancestral_draws_the_ddpm_posterior(sde, x64):
    """N(x_s | x_t, x̂_0) by Bayes' rule from p(x_s | x_0) and p(x_t | x_s) (Ho et al. 2020, eq. 7,
    for any linear SDE): with a = alpha_t/alpha_s and v = sigma_t² − a² sigma_s², variance
    v sigma_s²/sigma_t² and mean a sigma_s²/sigma_t² x_t + alpha_s v/sigma_t² x̂_0.
    """
    t, s, key = jnp.float64(0.5), jnp.float64(0.2), jax.random.key(4)
    x, score = jnp.array([0.8, 0.1]), lambda x, t: -jnp.tanh(x) * (1 + t)
    a = sde.alpha(t) / sde.alpha(s)
    v = sde.sigma(t) ** 2 - a**2 * sde.sigma(s) ** 2
    x0 = (x + sde.sigma(t) ** 2 * score(x, t)) / sde.alpha(t)
    ratio = sde.sigma(s) ** 2 / sde.sigma(t) ** 2
    mean = a * ratio * x + sde.alpha(s) * v / sde.sigma(t) ** 2 * x0
    noise = jax.random.normal(jax.random.clone(key), (2,))
    expected = mean + jnp.sqrt(v * ratio) * noise
    np.testing.assert_allclose(ss.ancestral(key, score, sde, x, t, s), expected, rtol=1e-12)


def test_euler_maruyama_is_its_formula(x64):
    sde, t, s, key = ss.VP(), jnp.float64(0.5), jnp.float64(0.4), jax.random.key(4)
    x, score = jnp.array([0.8, 0.1]), lambda x, t: -jnp.tanh(x) * (1 + t)
    beta = 0.1 + 0.5 * 19.9
    noise = jax.random.normal(jax.random.clone(key), (2,))
    expected = x + 0.1 * beta * (0.5 * x + score(x, t)) + jnp.sqrt(0.1 * beta) * noise
    got = ss.euler_maruyama(key, score, sde, x, t, s)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "evaluations"),
    [(ss.euler_maruyama, 1), (ss.ddim, 1), (ss.ancestral, 1), (ss.heun, 2)],
)
def test_evaluations_of_a_step(step, evaluations):
    calls = []
    score = lambda x, t: calls.append(1) or -x  # noqa: E731
    step(jax.random.key(0), score, ss.VP(), jnp.ones(2), jnp.float32(0.5), jnp.float32(0.4))
    assert len(calls) == evaluations


def test_init_and_finish():
    """`init` replaces the draw of the prior, and its key is not needed; `finish` maps the last
    state at the last time, by default to the posterior mean.
    """
    sde, key, ts = ss.VP(t0=1e-2, t1=0.5), lambda: jax.random.key(0), jnp.array([0.5, 0.3])
    score, init = ss.exact_score(oracle(), sde), jnp.array([0.4, -0.2])
    run = functools.partial(ss.sample, step=ss.ddim, ts=ts)
    raw = run(key(), score, sde, (2,), init=init, finish=None)
    by_hand = ss.ddim(key(), score, sde, init, ts[0], ts[1])
    np.testing.assert_allclose(raw, by_hand, rtol=1e-6)  # float32
    shift = lambda score_fn, sde, x, t: x + 100 * t  # noqa: E731
    shifted = run(key(), score, sde, (2,), init=init, finish=shift)
    np.testing.assert_allclose(shifted, raw + 30.0, rtol=1e-5)  # float32
    denoised = run(key(), score, sde, (2,), init=init)
    np.testing.assert_allclose(denoised, ss.denoise(score, sde, raw, ts[1]), rtol=1e-5)

    drawn = ss.sample(key(), lambda x, t: 0.0 * x, sde, (2,), step=still, ts=ts, finish=None)
    prior = ss.sample_prior(jax.random.split(key())[0], sde, (2,))
    np.testing.assert_array_equal(drawn, prior)
    solved = ss.solve_ode(key(), lambda x, t: 0.0 * x, Frozen(t0=1e-2, t1=0.5), (2,), ts=ts)
    np.testing.assert_array_equal(solved.x, prior)  # every sampler starts one key alike


def still(key, score_fn, sde, x_t, t, s):
    return x_t


@ss.register_pytree
@dataclasses.dataclass(frozen=True)
class Frozen(ss.VP):
    """Nothing moves."""

    def drift(self, x, t):
        return jnp.zeros_like(x)


@pytest.mark.parametrize("run", [ss.sample, ss.sample_sde, ss.sample_ode])
def test_bad_arguments_of_samplers(run):
    sde, ts = ss.VP(), jnp.array([1.0, 0.5])
    score = lambda x, t: -x  # noqa: E731
    with pytest.raises(ArgumentError, match="`key` must be a typed key"):
        run(jnp.zeros(2, jnp.uint32), score, sde, (2,), ts=ts)
    with pytest.raises(ArgumentError, match="`init` must have shape"):
        run(jax.random.key(0), score, sde, (2,), ts=ts, init=jnp.zeros((5, 2)))
    with pytest.raises(ArgumentError, match="`init` must be finite"):
        run(jax.random.key(0), score, sde, (2,), ts=ts, init=jnp.array([0.0, jnp.nan]))
    with pytest.raises(ArgumentError, match="`score_fn` must return the shape of `x`"):
        run(jax.random.key(0), lambda x, t: x[:1], sde, (2,), ts=ts)


def test_bad_arguments_of_langevin():
    key, x, score = jax.random.key(0), jnp.zeros(2), lambda x: -x
    for bad, words in (
        ({"num_steps": 0, "step_size": 0.1}, "`num_steps`"),
        ({"num_steps": 1, "step_size": 0.0}, "`step_size`"),
    ):
        with pytest.raises(ArgumentError, match=words):
            ss.langevin_sample(key, score, x, **bad)
    with pytest.raises(ArgumentError, match="must return the shape"):
        ss.langevin_sample(key, lambda x: x[None], x, step_size=0.1, num_steps=1)
