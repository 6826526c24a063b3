"""Orders of convergence of the samplers on our reverse equations, by regression over step sizes
in float64 against the oracle.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture, slow

import sde_score as ss

# Coefficients of order one and a mild mixture: every step size below is asymptotic.
SDE = ss.VP(beta_min=0.5, beta_max=4.0, t0=5e-2)
FINEST = 0.95 / 256  # the shortest step of the strong orders


def order(steps, errors):
    """The slope of log error against log step size."""
    return np.polyfit(-np.log(steps), np.log(errors), 1)[0]


def root_mean_square(difference):
    return np.sqrt(np.mean(np.sum(difference**2, axis=1)))


def mild_mixture():
    weights, means, covariances = mixture(np.float64)
    return ss.GaussianMixture(weights, means, covariances + 0.3 * np.eye(2))


def gaussian():
    covariance = np.array([[[0.6, 0.2], [0.2, 0.4]]])
    return ss.GaussianMixture(np.ones(1), np.array([[0.7, -0.4]]), covariance)


def without_noise(step, score, x, t, s):
    """A step's mean and the scale of its additive noise, from two draws of it."""
    first, second = jax.random.split(jax.random.key(0))
    a, b = (step(key, score, SDE, x, t, s) for key in (first, second))
    z_a, z_b = (jax.random.normal(key, x.shape) for key in (first, second))
    scale = (a - b) / (z_a - z_b)
    return a - scale * z_a, scale


def moments_after(step, num_steps, gmm):
    """Mean and covariance of x_t0 when x_t1 ~ p_t1 exactly: for a Gaussian's score a step is
    affine in x and in its noise, so both follow from its Jacobian, without sampling.
    """
    score, start = ss.exact_score(gmm, SDE), ss.marginal(gmm, SDE, SDE.t1)
    ts = ss.uniform_grid(SDE, num_steps)

    def advance(moments, times):
        mean, covariance = moments
        linear = jax.jacfwd(lambda x: without_noise(step, score, x, *times)[0])(mean)
        mean, scale = without_noise(step, score, mean, *times)
        return (mean, linear @ covariance @ linear.T + jnp.diag(scale**2)), None

    return jax.lax.scan(advance, (start.means[0], start.covariances[0]), (ts[:-1], ts[1:]))[0]


def test_euler_maruyama_is_of_weak_order_one(x64):
    """Exact moments of the discrete chain against those of p_t0: no statistical error."""
    steps, gmm = np.array([20, 40, 80, 160, 320]), gaussian()
    exact = ss.marginal(gmm, SDE, SDE.t0)

    @jax.jit
    def errors(gmm):
        moments = [moments_after(ss.euler_maruyama, int(n), gmm) for n in steps]
        means, covariances = (jnp.stack(values) for values in zip(*moments, strict=True))
        return (
            jnp.linalg.norm(means - exact.means, axis=1),
            jnp.linalg.norm(covariances - exact.covariances, axis=(1, 2)),
        )

    with jax.debug_key_reuse(False):  # `without_noise` replays a draw
        orders = [order(steps, error) for error in errors(gmm)]
    print("Euler–Maruyama, weak order of the mean and the covariance:", orders)
    assert all(abs(value - 1.0) < 0.25 for value in orders)


def test_euler_maruyama_is_of_strong_order_one(x64):
    """1,000 paths of the mixture's reverse SDE, against 2,048 steps along the same Brownian
    paths, whose own error is 1/16 of that of 128 steps.
    """
    steps, finest, gmm = np.array([8, 16, 32, 64, 128]), 2048, mild_mixture()
    score, start_key, noise_key = ss.exact_score(gmm, SDE), *jax.random.split(jax.random.key(1))
    start = jax.vmap(ss.marginal(gmm, SDE, SDE.t1).sample)(jax.random.split(start_key, 1_000))
    normals = jax.random.normal(noise_key, (finest, *start.shape))
    step = functools.partial(without_noise, ss.euler_maruyama)

    def path(num_steps, normals):
        ts = ss.uniform_grid(SDE, num_steps)
        size = finest // num_steps  # the sum of `size` increments, standardised
        coarse = normals.reshape(num_steps, size, *start.shape).sum(1) / np.sqrt(size)

        def advance(x, inputs):
            z, t, s = inputs
            mean, scale = jax.vmap(lambda x: step(score, x, t, s))(x)
            return mean + scale * z, None

        return jax.lax.scan(advance, start, (coarse, ts[:-1], ts[1:]))[0]

    with jax.debug_key_reuse(False):  # `without_noise` replays a draw
        run = jax.jit(lambda normals: [path(int(n), normals) for n in [*steps, finest]])
        *solutions, reference = run(normals)
    errors = np.array([root_mean_square(x - reference) for x in solutions])
    value = order(steps, errors)
    print("Euler–Maruyama, strong:", value, errors)
    assert abs(value - 1.0) < 0.15


@functools.cache
def paths(solver, num_steps, count=500):
    """x_t0 along `count` Brownian paths, the same for every number of steps: a tolerance below
    half the shortest of all steps gives every solve one tree.

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


@pytest.mark.diffrax_keys  # a Brownian tree splits its keys again
@pytest.mark.parametrize("solver", [diffrax.ShARK(), diffrax.SRA1()], ids=["ShARK", "SRA1"])
@pytest.mark.slow
def test_stochastic_runge_kutta_is_of_strong_order_three_halves(solver, x64):
    """Against ShARK's 256 steps on the same paths, whose own error is some 10 times below that of
    64 steps.
    """
    steps = np.array([4, 8, 16, 32, 64])
    reference = paths(diffrax.ShARK(), 256)
    errors = np.array([root_mean_square(paths(solver, int(n)) - reference) for n in steps])
    value = order(steps, errors)
    print(f"{type(solver).__name__}, strong:", value, errors)
    assert value >= 1.35


ODE_SOLVERS = {"Heun": 2, "Tsit5": 5, "Dopri5": 5}


@pytest.mark.parametrize(
    "name", ["Tsit5", *(slow(name) for name in ODE_SOLVERS if name != "Tsit5")]
)
def test_orders_of_diffrax_solvers_on_the_probability_flow(name, x64):
    """On equal steps in log-SNR, as few as keep order 5 above rounding."""
    expected, gmm = ODE_SOLVERS[name], gaussian()
    steps = np.array([32, 45, 64, 91, 128])
    x = jnp.array([[1.3, -0.9], [-0.4, 0.8], [0.2, 1.7]])
    exact = jax.vmap(lambda x: ss.gaussian_flow(gmm, SDE, x, SDE.t1, SDE.t0))(x)
    run = lambda x, ts: ss.sample_ode(
        *(jax.random.key(0), ss.exact_score(gmm, SDE), SDE, (2,)),
        **{"ts": ts, "init": x, "solver": getattr(diffrax, name)()},
    )
    solve = jax.jit(jax.vmap(run, in_axes=(0, None)))
    solutions = [solve(x, ss.log_snr_grid(SDE, int(n))) for n in steps]
    errors = np.array([root_mean_square(y - exact) for y in solutions])
    value = order(steps, errors)
    print(f"{name}:", value, errors)
    assert value > expected - (0.1 if expected < 3 else 0.2)
    assert expected > 2 or value < expected + 0.1


@pytest.mark.parametrize(("step", "expected"), [(ss.ddim, 1), (ss.heun, 2)])
def test_orders_of_the_deterministic_steps(step, expected, x64):
    """The probability flow of one Gaussian is known in closed form."""
    steps, gmm = np.array([10, 20, 40, 80, 160]), gaussian()
    x = jnp.array([[1.3, -0.9], [-0.4, 0.8], [0.2, 1.7]])
    exact = jax.vmap(lambda x: ss.gaussian_flow(gmm, SDE, x, SDE.t1, SDE.t0))(x)

    def run(num_steps, key, x):
        options = {"ts": ss.uniform_grid(SDE, num_steps), "init": x, "finish": None}
        return ss.sample(key, ss.exact_score(gmm, SDE), SDE, (2,), step=step, **options)

    @jax.jit
    @jax.vmap
    def all_runs(key, x):
        return [run(int(n), key, x) for n in steps]

    with jax.debug_key_reuse(False):  # no noise is drawn: one key serves all
        solutions = all_runs(jax.random.split(jax.random.key(0), len(x)), x)
    errors = np.array([root_mean_square(y - exact) for y in solutions])
    value = order(steps, errors)
    print(f"{step.__name__}:", value, errors)
    assert abs(value - expected) < 0.1
