"""The SDEs against their identities, their closed forms and an integration of their moments."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from sde_score import (
    SDE,
    VE,
    VP,
    SubVP,
    log_snr,
    perturb,
    prior_log_prob,
    register_pytree,
    reverse_drift,
    sample_prior,
    time_of_log_snr,
)


@register_pytree
@dataclasses.dataclass(frozen=True)
class Cosine:
    """A user's own SDE in six members: alpha = cos(πt/2), sigma = scale sin(πt/2)."""

    scale: float = 1.5
    t0: float = 1e-4
    t1: float = 0.98

    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t)

    def sigma(self, t):
        return self.scale * jnp.sin(0.5 * jnp.pi * t)

    def drift(self, x, t):
        return -0.5 * jnp.pi * jnp.tan(0.5 * jnp.pi * t) * x

    def diffusion(self, t):
        return self.scale * jnp.sqrt(jnp.pi * jnp.tan(0.5 * jnp.pi * t))


SDES = [VP(), SubVP(), VE(), Cosine()]
sdes = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def times(sde):
    """Seven times from t0 to t1, most of them near t0, where formulas lose digits."""
    return sde.t0 + (sde.t1 - sde.t0) * np.array([0.0, 1e-4, 1e-2, 0.1, 0.3, 0.77, 1.0])


def within(estimates, truth, num_errors=5.0):
    """The mean of independent `estimates` (leading axis) is within 5 standard errors of `truth`,
    which a right formula misses once in 2 million.
    """
    estimates = np.asarray(estimates, np.float64)
    stderr = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    deviation = np.abs(estimates.mean(0) - truth)
    assert np.all(deviation <= num_errors * stderr + 1e-12), (estimates.mean(0), truth, stderr)


@sdes
def test_six_members_are_an_sde(sde):
    assert isinstance(sde, SDE)


@sdes
def test_identities_of_a_linear_sde(sde, x64):
    """f/x = d log alpha/dt, g² = d sigma²/dt − 2 (d log alpha/dt) sigma² and g²/sigma² = −d
    log_snr/dt.
    """

    @jax.jit
    @jax.vmap
    def sides(t):
        def slope(fn):
            return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]

        dlog_alpha = slope(lambda t: jnp.log(sde.alpha(t)))
        dvariance = slope(lambda t: sde.sigma(t) ** 2)
        variance, squared = sde.sigma(t) ** 2, sde.diffusion(t) ** 2
        left = sde.drift(jnp.ones_like(t), t), squared, squared / variance
        right = (
            dlog_alpha,
            dvariance - 2.0 * dlog_alpha * variance,
            -slope(lambda t: log_snr(sde, t)),
        )
        return jnp.stack(left), jnp.stack(right)

    left, right = sides(times(sde))
    # float64 rounding is 1e-16; the acceptance threshold of the project is 1e-10
    np.testing.assert_allclose(left, right, rtol=1e-10)
    assert np.all(np.asarray(left)[:, 1:] > 0)


def test_closed_forms(x64):
    """Each formula of the papers, written once more in numpy."""
    t = times(VP())
    beta, int_beta = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2

    def close(got, want):
        return np.testing.assert_allclose(got, want, rtol=1e-12)

    vp, sub, ve = VP(), SubVP(), VE()
    close(vp.beta(t), beta)
    close(vp.int_beta(t), int_beta)
    close(vp.alpha(t), np.exp(-0.5 * int_beta))
    close(vp.sigma(t), np.sqrt(-np.expm1(-int_beta)))
    close(vp.diffusion(t), np.sqrt(beta))
    close(vp.drift(3.0, t), -1.5 * beta)
    close(sub.alpha(t), np.exp(-0.5 * int_beta))
    close(sub.sigma(t), -np.expm1(-int_beta))  # often misprinted as 1 − e^{−2B}
    close(sub.diffusion(t), np.sqrt(beta * -np.expm1(-2 * int_beta)))
    close(ve.alpha(t), 1.0)
    close(ve.sigma(t), 0.01 * 5000.0**t)
    close(ve.diffusion(t), 0.01 * 5000.0**t * np.sqrt(2.0 * np.log(5000.0)))
    close(ve.drift(3.0, 0.5), 0.0)


def test_ve_carries_sigma_min_at_time_zero_and_sigma_max_at_one():
    np.testing.assert_allclose(VE(t0=0.0).sigma(0.0), 0.01, rtol=1e-6)  # float32 rounding
    np.testing.assert_allclose(VE().sigma(1.0), 50.0, rtol=2e-6)  # ×ln 5000 of it in the exponent


@sdes
def test_integrated_moments(sde, x64):
    """dm/dt = f(m), dV/dt = 2 (f/x) V + g² from (alpha, sigma²) at t0 lead to those at every t."""
    steps = 4000
    # A grid that starts finely: t0 + (t1 − t0) u², whose Jacobian is 2 (t1 − t0) u.
    u = np.linspace(0.0, 1.0, 2 * steps + 1)
    t, jacobian = sde.t0 + (sde.t1 - sde.t0) * u**2, 2.0 * (sde.t1 - sde.t0) * u
    rate = np.asarray(sde.drift(jnp.ones_like(t), t)) * jacobian
    noise = np.asarray(sde.diffusion(t)) ** 2 * jacobian
    h, y = 1.0 / steps, np.array([sde.alpha(sde.t0), sde.sigma(sde.t0) ** 2])
    path = [y]
    for n in range(0, 2 * steps, 2):  # the classical Runge–Kutta method

        def slope(y, i):
            return np.array([rate[i] * y[0], 2.0 * rate[i] * y[1] + noise[i]])

        k1 = slope(y, n)
        k2 = slope(y + 0.5 * h * k1, n + 1)
        k3 = slope(y + 0.5 * h * k2, n + 1)
        k4 = slope(y + h * k3, n + 2)
        y = y + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        path.append(y)
    mean, variance = np.array(path).T
    # Fourth order at h = 1/4000 with rates up to 50: (50/4000)⁴/120 = 2e-10 per unit of time
    np.testing.assert_allclose(mean, sde.alpha(t[::2]), rtol=1e-8)
    np.testing.assert_allclose(np.sqrt(variance), sde.sigma(t[::2]), rtol=1e-8)


@sdes
def test_float32_sigma_at_small_times(sde):
    sde = dataclasses.replace(sde, t0=1e-5)
    single = sde.sigma(jnp.float32(1e-5))
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = float(sde.sigma(jnp.float64(1e-5)))
    assert abs(float(single) / double - 1.0) < 1e-6


def test_the_naive_sigma_would_fail_in_float32():
    """√(1 − e^{−B}) without expm1 is half a per cent off at t = 1e-5: the test above can tell."""
    naive = jnp.sqrt(1.0 - jnp.exp(-VP().int_beta(jnp.float32(1e-5))))
    assert abs(float(naive) / float(VP().sigma(jnp.float32(1e-5))) - 1.0) > 0.003


@sdes
def test_perturb(sde):
    """x_t has mean alpha x_0 and standard deviation sigma, and comes with the noise in it."""
    t, x0 = jnp.float32(0.4), jnp.full(20_000, 2.0)
    x_t, noise = perturb(jax.random.key(0), sde, x0, t)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    within(x_t, 2.0 * alpha)
    within((np.asarray(x_t, np.float64) - 2.0 * alpha) ** 2, sigma**2)
    np.testing.assert_allclose(x_t - 2.0 * alpha, sigma * noise, atol=1e-5 * sigma + 1e-6)


@sdes
def test_time_of_log_snr_inverts_log_snr(sde, x64):
    t = times(sde)
    # bisection to 2^-70, then rounding of log_snr (|log_snr| ≤ 30) over its slope in log t (≥ 1)
    np.testing.assert_allclose(time_of_log_snr(sde, log_snr(sde, t)), t, rtol=1e-12)


def test_time_of_log_snr_closed_forms(x64):
    """With y = −log_snr: VP e^B = 1 + e^y; sub-VP B = 2 asinh(e^{y/2}/2); VE log sigma = y/2; and
    t = 2B/(b + √(b² + 2 Δ B)).
    """
    y = np.linspace(-9.0, 8.0, 18)

    def time(int_beta):
        return 2.0 * int_beta / (0.1 + np.sqrt(0.01 + 2.0 * 19.9 * int_beta))

    vp = time(np.log1p(np.exp(y)))
    sub_vp = time(2.0 * np.arcsinh(np.exp(0.5 * y) / 2.0))
    ve = (0.5 * y - np.log(0.01)) / np.log(5000.0)
    np.testing.assert_allclose(time_of_log_snr(VP(), -y), vp, rtol=1e-11)
    np.testing.assert_allclose(time_of_log_snr(SubVP(t0=1e-5), -y), sub_vp, rtol=1e-11)
    np.testing.assert_allclose(time_of_log_snr(VE(), -y[:-1]), ve[:-1], rtol=1e-11)
    # Outside the range of log_snr the nearest end is returned.
    np.testing.assert_allclose(
        time_of_log_snr(VP(), jnp.array([99.0, -99.0])), [1e-5, 1.0], rtol=1e-12
    )


@sdes
def test_prior(sde):
    """sample_prior and prior_log_prob are N(0, sigma(t1)² I)."""
    sigma = float(sde.sigma(jnp.float32(sde.t1)))
    draws = sample_prior(jax.random.key(1), sde, (100, 200))
    within(draws.ravel(), 0.0)
    within(np.asarray(draws, np.float64).ravel() ** 2, sigma**2)
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, 2)) * sigma
        want = norm(scale=float(sde.sigma(sde.t1))).logpdf(x).sum()
        np.testing.assert_allclose(prior_log_prob(sde, jnp.asarray(x)), want, rtol=1e-13)


@sdes
@pytest.mark.parametrize("churn", [1.0, 0.0, 0.6])
def test_reverse_drift_keeps_the_marginals(sde, churn, x64):
    """For x_0 ~ N(0, v0): with s = −x/V, dV/dt = 2 a V − (churn g)² backwards in time equals the
    forward 2 (f/x) V + g², for a = reverse_drift/x.
    """
    t, x = jnp.asarray(0.37), jnp.asarray([0.8])
    variance = 0.7 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2
    drift = reverse_drift(lambda x, t: -x / variance, sde, x, t, churn=churn)
    squared, rate = sde.diffusion(t) ** 2, sde.drift(x, t) / x
    backward = 2.0 * drift / x * variance - churn**2 * squared
    np.testing.assert_allclose(backward, 2.0 * rate * variance + squared, rtol=1e-12)


@sdes
def test_reverse_drift_closed_forms(sde, x64):
    """churn 1 (the default) is f − g² s, churn 0 is f − ½ g² s."""
    score, t, x = (lambda x, t: jnp.sin(x) + t), 0.3, jnp.asarray([0.5, -2.0])
    push = np.asarray(sde.diffusion(t) ** 2 * score(x, t))
    drift = np.asarray(sde.drift(x, t))

    def close(got, want):
        return np.testing.assert_allclose(got, want, rtol=1e-13)

    close(reverse_drift(score, sde, x, t), drift - push)
    close(reverse_drift(score, sde, x, t, churn=0.0), drift - 0.5 * push)


PAIRS = [
    (VP(), VP(beta_min=0.2, beta_max=12.0, t1=0.9)),
    (SubVP(), SubVP(beta_max=12.0)),
    (VE(), VE(sigma_max=90.0)),
    (Cosine(), Cosine(scale=2.0)),
]


@pytest.mark.parametrize(("sde", "other"), PAIRS, ids=lambda sde: type(sde).__name__)
def test_two_sdes_of_a_type_trace_once(sde, other):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def everything(key, sde, x, t):
        noise_key, prior_key = jax.random.split(key)
        return (
            perturb(noise_key, sde, x, t),
            sample_prior(prior_key, sde, x.shape),
            prior_log_prob(sde, x),
            time_of_log_snr(sde, log_snr(sde, t)),
            reverse_drift(lambda x, t: -x, sde, x, t),
        )

    first, second = (
        everything(jax.random.key(2), sde, jnp.ones(3), jnp.float32(0.5)) for sde in (sde, other)
    )
    # different SDEs give different numbers: nothing of the first is a constant of the program
    assert not np.allclose(first[0][0], second[0][0])
    assert not np.allclose(first[4], second[4])


def test_vmap_and_grad_over_a_constant(x64):
    beta_max = jnp.array([5.0, 20.0])

    def sigma(b):
        return VP(beta_max=b).sigma(0.5)

    int_beta = 0.05 + 0.125 * (np.asarray(beta_max) - 0.1)
    np.testing.assert_allclose(
        jax.vmap(sigma)(beta_max), np.sqrt(-np.expm1(-int_beta)), rtol=1e-13
    )
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), VP(), VP(beta_max=5.0))
    stacked = jax.vmap(lambda sde: sde.sigma(0.5))(pair)
    np.testing.assert_allclose(stacked, sigma(beta_max)[::-1], rtol=1e-13)
    h = 1e-5  # central difference: truncation h² = 1e-10, rounding 1e-16/h = 1e-11
    finite = (sigma(20.0 + h) - sigma(20.0 - h)) / (2.0 * h)
    np.testing.assert_allclose(jax.grad(sigma)(20.0), finite, rtol=1e-6)


def test_an_sde_is_data():
    assert repr(VP()) == "VP(beta_min=0.1, beta_max=20.0, t0=1e-05, t1=1.0)"
    assert VP() == VP(0.1) and VP() != VP(0.2) and VP() != SubVP(t0=1e-5)
    assert hash(VE()) == hash(VE(0.01))
    assert dataclasses.replace(VE(), sigma_max=90.0) == VE(0.01, 90.0)
    assert dataclasses.asdict(SubVP())["t0"] == 1e-3
    assert jax.tree.leaves(VE()) == [0.01, 50.0, 1e-5, 1.0]
    assert jax.tree.map(lambda x: x, VP()) == VP()


def draw(x0, t, sde=VP()):  # noqa: B008
    return perturb(jax.random.key(0), sde, x0, t)


BAD = {
    "beta_min zero": (lambda: VP(beta_min=0.0), "`beta_min` must be finite and above 0; got 0"),
    "beta_max negative": (lambda: SubVP(beta_max=-1), "`beta_max`.*above 0; got -1"),
    "beta_max nan": (lambda: VP(beta_max=float("nan")), "`beta_max` must be finite"),
    "numpy number": (lambda: VP(beta_min=np.float32(-1.0)), "`beta_min`.*got -1"),
    "t0 zero": (lambda: VP(t0=0.0), "`t0`.*above 0"),
    "t1 infinite": (lambda: VP(t1=float("inf")), "`t1` must be finite"),
    "t0 above t1": (lambda: VP(t0=2.0), "`t0` must be below `t1`; got t0=2.0, t1=1.0"),
    "t0 negative": (lambda: VE(t0=-0.1), "`t0`.*at least 0"),
    "sigma_min zero": (lambda: VE(sigma_min=0.0), "`sigma_min`.*above 0"),
    "sigma_min above": (lambda: VE(sigma_min=60.0), "`sigma_min` must be below `sigma_max`"),
    "sigmas equal": (lambda: VE(1.0, 1.0), "got sigma_min=1.0, sigma_max=1.0"),
    "late": (
        lambda: draw(jnp.ones(2), 1.5),
        r"`t` must lie in \[t0, t1\].*got 1.5",
    ),
    "early": (
        lambda: draw(jnp.ones(2), 0.0),
        r"replace\(sde, t0=...\)",
    ),
    "early sub-VP": (
        lambda: draw(jnp.ones(2), 1e-5, SubVP()),
        "of SubVP; got 1e-05",
    ),
    "several times": (
        lambda: draw(jnp.ones(2), jnp.array([0.1, 0.2])),
        r"`t` must have shape \(\); got \(2,\).*vmap",
    ),
    "integers": (
        lambda: draw(jnp.arange(2), 0.5),
        "floating point; got int32",
    ),
    "raw key": (lambda: perturb(jax.random.PRNGKey(0), VP(), jnp.ones(2), 0.5), "typed key"),
    "several keys": (
        lambda: sample_prior(jax.random.split(jax.random.key(0), 3), VP(), (2,)),
        r"one key; got an array of keys of shape \(3,\)",
    ),
    "seed": (lambda: sample_prior(0, VP(), (2,)), r"typed key; got 0.*jax.random.key\(seed\)"),
    "list": (lambda: prior_log_prob(VP(), [1.0, 2.0]), "`x` must be an array; got list"),
    "prior of integers": (lambda: prior_log_prob(VP(), jnp.arange(2)), "floating point"),
    "batched score": (
        lambda: reverse_drift(lambda x, t: x[None], VP(), jnp.ones(2), 0.5),
        r"must return the shape of `x`; got \(1, 2\) for x of shape \(2,\)",
    ),
    "failing score": (
        lambda: reverse_drift(lambda x, t: x[:, 0], VP(), jnp.ones(2), 0.5),
        "`score_fn` failed on one example",
    ),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()


def test_times_at_the_ends_pass_in_float32():
    """float32(1e-5) lies below the float64 number; rounding is no error."""
    for t in (jnp.float32(1e-5), jnp.float32(1.0)):
        assert np.all(np.isfinite(perturb(jax.random.key(3), VP(), jnp.ones(2), t)[0]))


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE()], ids=["VP", "SubVP", "VE"])
def test_time_of_log_snr_is_differentiable(sde, x64):
    """In its value, where dt/dvalue = −sigma²/g², and in the SDE's constants."""
    value = log_snr(sde, 0.4)
    slope = jax.grad(lambda value: time_of_log_snr(sde, value))(value)
    np.testing.assert_allclose(slope, -((sde.sigma(0.4) / sde.diffusion(0.4)) ** 2), rtol=1e-10)
    name = "sigma_max" if isinstance(sde, VE) else "beta_max"
    at = lambda number: time_of_log_snr(dataclasses.replace(sde, **{name: number}), value)
    number, h = getattr(sde, name), 1e-5
    difference = (at(number + h) - at(number - h)) / (2 * h)  # error of order h², and rounding
    np.testing.assert_allclose(jax.grad(at)(number), difference, rtol=1e-6)
