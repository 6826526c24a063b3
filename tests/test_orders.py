"""Orders of convergence of the samplers on our reverse equations, by regression over step sizes
in float64 against the oracle.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture

import sde_score as ss

# Coefficients of order one and a mild mixture: every step size below is asymptotic.
SDE = ss.VP(beta_min=0.5, beta_max=4.0, t0=5e-2)
FINEST = 0.95 / 256  # the shortest step of the strong orders


def order(steps, errors):
    """The slope of log error against log step size."""
    return np.polyfit(-np.log(steps), np.log(errors), 1)[0]


def mild_mixture():
    weights, means, covariances = mixture(np.float64)
    return ss.GaussianMixture(weights, means, covariances + 0.3 * np.eye(2))


def gaussian():
    covariance = np.array([[[0.6, 0.2], [0.2, 0.4]]])
    return ss.GaussianMixture(np.ones(1), np.array([[0.7, -0.4]]), covariance)


def moments_after(step, num_steps, gmm):
    """Mean and covariance of x_t0 when x_t1 ~ p_t1 exactly: for a Gaussian's score a step is
    affine in x and in its noise, so both follow from its Jacobians, without sampling.
    """
    score, start = ss.exact_score(gmm, SDE), ss.marginal(gmm, SDE, SDE.t1)
    ts, key, zero = ss.uniform_grid(SDE, num_steps), jax.random.key(0), jnp.zeros(2)
    noise = jax.random.normal(key, (2,))

    def advance(moments, times):
        mean, covariance = moments
        move = lambda x: step(key, score, SDE, x, *times)  # noqa: E731
        still = lambda x: (
            x
            - (times[0] - times[1])
            * ss.reverse_drift(  # noqa: E731
                score, SDE, x, times[0]
            )
        )
        linear = jax.jacfwd(move)(zero)
        scale = (move(zero) - still(zero)) / noise
        return (
            still(mean),
            linear @ covariance @ linear.T + jnp.diag(scale**2),
        ), None

    moments = (start.means[0], start.covariances[0])
    return jax.lax.scan(advance, moments, (ts[:-1], ts[1:]))[0]


def test_euler_maruyama_is_of_weak_order_one(x64):
    """Exact moments of the discrete chain against those of p_t0: no statistical error."""
    steps, gmm = np.array([20, 40, 80, 160, 320]), gaussian()
    exact = ss.marginal(gmm, SDE, SDE.t0)
    errors = {"mean": [], "covariance": []}
    with jax.debug_key_reuse(False):  # one key on purpose: only the noise's scale is asked for
        for num_steps in steps:
            run = jax.jit(functools.partial(moments_after, ss.euler_maruyama, int(num_steps)))
            mean, covariance = run(gmm)
            errors["mean"].append(jnp.linalg.norm(mean - exact.means[0]))
            errors["covariance"].append(jnp.linalg.norm(covariance - exact.covariances[0]))
    orders = {name: order(steps, np.array(error)) for name, error in errors.items()}
    print("Euler–Maruyama, weak:", orders)
    assert all(abs(value - 1.0) < 0.25 for value in orders.values()), orders


def paths(solver, num_steps, count=1_000):
    """x_t0 along `count` Brownian paths, the same for every number of steps of one solver (and of
    ShARK and SRA1): a tolerance below half the shortest of all steps gives every solve one tree.

    The batch is the event, which costs one tree for all paths.
    """
    gmm = mild_mixture()
    start_key, key = jax.random.split(jax.random.key(1))
    start = jax.vmap(ss.marginal(gmm, SDE, SDE.t1).sample)(jax.random.split(start_key, count))

    @jax.jit
    def draw(key, start):
        score = jax.vmap(ss.exact_score(gmm, SDE), in_axes=(0, None))
        options = {"ts": ss.uniform_grid(SDE, num_steps), "init": start, "finish": None}
        return ss.sample_sde(
            key, score, SDE, start.shape, solver=solver, brownian_tol=FINEST / 2, **options
        )

    return np.asarray(draw(key, start))


def root_mean_square(difference):
    return np.sqrt(np.mean(np.sum(difference**2, axis=1)))


@pytest.mark.diffrax_keys
def test_euler_maruyama_is_of_strong_order_one(x64):
    """‖x_h − x_{h/2}‖ ∝ h^1: the error without a reference of its own error."""
    steps = np.array([8, 16, 32, 64, 128])
    solutions = [paths(diffrax.Euler(), int(n)) for n in [*steps, 256]]
    errors = [root_mean_square(a - b) for a, b in zip(solutions[:-1], solutions[1:], strict=True)]
    value = order(steps, np.array(errors))
    print("Euler–Maruyama, strong:", value, errors)
    assert abs(value - 1.0) < 0.15


@pytest.mark.diffrax_keys
def test_shark_is_of_strong_order_three_halves(x64):
    """Against ShARK's 256 steps on the same paths, whose own error is some 10 times below that of
    64 steps; SRA1 at 64 steps agrees with it as well, so neither shares a bias with itself only.
    """
    steps = np.array([4, 8, 16, 32, 64])
    reference = paths(diffrax.ShARK(), 256)
    solutions = (paths(diffrax.ShARK(), int(n)) for n in steps)
    errors = np.array([root_mean_square(x - reference) for x in solutions])
    value = order(steps, errors)
    print("ShARK, strong:", value, errors)
    assert value >= 1.35
    other = root_mean_square(paths(diffrax.SRA1(), 64) - reference)
    assert other < 2 * errors[-1]  # SRA1's error constant is 1.3 times ShARK's here


@pytest.mark.diffrax_keys
def test_orders_of_the_flow(x64):
    """The probability flow of one Gaussian is known in closed form."""
    steps, gmm = np.array([10, 20, 40, 80, 160]), gaussian()
    score, key = ss.exact_score(gmm, SDE), jax.random.key(0)
    x = jnp.array([[1.3, -0.9], [-0.4, 0.8], [0.2, 1.7]])
    exact = jax.vmap(lambda x: ss.gaussian_flow(gmm, SDE, x, SDE.t1, SDE.t0))(x)

    def stepped(step, ts, x):
        return ss.sample(key, score, SDE, (2,), step=step, ts=ts, init=x, finish=None)

    def solved(solver, ts, x):
        return ss.sample_ode(key, score, SDE, (2,), solver=solver, ts=ts, init=x)

    for name, method, expected, tolerance in (
        ("ddim", functools.partial(stepped, ss.ddim), 1, 0.1),
        ("heun", functools.partial(stepped, ss.heun), 2, 0.1),
        ("diffrax.Heun", functools.partial(solved, diffrax.Heun()), 2, 0.1),
    ):
        with jax.debug_key_reuse(False):  # no method here draws noise
            run = jax.jit(jax.vmap(method, in_axes=(None, 0)))
            errors = [
                root_mean_square(run(ss.uniform_grid(SDE, int(n)), x) - exact) for n in steps
            ]
        value = order(steps, np.array(errors))
        print(f"{name}:", value, errors)
        assert abs(value - expected) < tolerance
