"""How far from the posterior are guided samples? Each method of `guidance` and `inverse` on linear
problems whose posterior is a closed form: Gaussian mixtures seen through an operator, with the
exact score of the prior.

Errors against `GaussianMixture.posterior`, root mean squares over observations y drawn from the
model: of the mean, in units of the root of the posterior's total variance; of the covariance,
relative, in Frobenius' norm; of the modes' weights, in total variation. The row `posterior` has
those of as many exact draws, `exact` those of the exact conditional score: the sampler's own.

All take steps equal in log-SNR under VP, ancestral but for twisted SMC's. `dps` is a score, whose
move shrinks with the steps; `dps_step` moves x_s by the published, constant rule. `inpaint` keeps
y as if without noise: its truth is the posterior that has none. A step costs so many evaluations
of the score (`evaluations` along the way), each with a backward pass where `backward` says so;
particles are the draws of a run of `twisted_smc`, whose errors are root mean squares over runs
too, and are relative to the truth as a weighted sum.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sde_score as ss
from benchmarks._measure import context
from benchmarks._mixtures import load_mixture

SEED, OBSERVATIONS, RUNS = 0, 3, 6
SDE = ss.VP(t0=1e-3)
STEPS = (20, 50, 200)
PARTICLES = (64, 256, 1024)


class Problem(NamedTuple):
    """A mixture seen through an operator; `mask` where that is one."""

    mixture: str
    operator: Callable[[], ss.LinearOperator]
    noise: float
    mask: np.ndarray | None = None


def masked(mixture, dim, num, noise):
    mask = np.arange(dim) < num
    return Problem(mixture, partial(ss.mask_operator, mask), noise, mask)


PROBLEMS = {
    "mask_2d": masked("mixture_2d", 2, 1, 0.1),
    "projection_2d": Problem(
        "mixture_2d", lambda: ss.random_projection(jax.random.key(5), (2,), 1), 0.3
    ),
    "mask_16d": masked("mixture_16d", 16, 2, 0.1),
    "blur_16d": Problem("mixture_16d", lambda: ss.blur_operator((16,), np.full(9, 1 / 9)), 0.3),
    "downsampling_16d": Problem("mixture_16d", lambda: ss.downsampling_operator((16,), 8), 0.1),
}


class Method(NamedTuple):
    """`make(gmm, problem, operator, y, score, setting)` gives the score and the step."""

    make: Callable
    settings: tuple[float | None, ...] = (None,)
    evaluations: int = 1
    backward: bool = False
    keeps: bool = False  # takes a mask, and y for exact


def exact(gmm, problem, operator, y, score, _):
    return ss.exact_score(gmm.posterior(operator, y, problem.noise), SDE), ss.ancestral


def dps(gmm, problem, operator, y, score, scale):
    return ss.dps(score, SDE, operator, y, scale=scale), ss.ancestral


def dps_step(gmm, problem, operator, y, score, zeta):
    moved = ss.dps(score, SDE, operator, y, scale=zeta)

    def step(key, score_fn, sde, x, t, s):
        move = moved(x, t) - score_fn(x, t)  # −(ζ/‖r‖) ∇ ‖r‖²
        return ss.ancestral(key, score_fn, sde, x, t, s) + move

    return score, step


def pgdm(gmm, problem, operator, y, score, sigma_data):
    options = {"noise": problem.noise, "sigma_data": sigma_data}
    return ss.pgdm(score, SDE, operator, y, **options), ss.ancestral


def inpaint(resamples, gmm, problem, operator, y, score, _):
    observed = operator.adjoint(y)
    step = ss.inpaint(ss.ancestral, observed, problem.mask, num_resamples=resamples)
    return score, step


METHODS = {
    "exact": Method(exact),
    "dps": Method(dps, (0.3, 1.0, 3.0), backward=True),
    "dps_step": Method(dps_step, (0.1, 0.3, 1.0), backward=True),
    "pgdm": Method(pgdm, (0.3, 1.0), backward=True),
    "inpaint": Method(partial(inpaint, 1), keeps=True),
    "repaint": Method(partial(inpaint, 10), evaluations=10, keeps=True),
}


@partial(jax.jit, static_argnums=(0, 1))
def run(name, method, operator, ys, keys, setting, ts, num_steps):
    """Samples [observations, n, d], along the first steps of ts: one program for any number."""
    problem = PROBLEMS[name]
    gmm = load_mixture(problem.mixture)
    score = ss.exact_score(gmm, SDE)

    def one(y, key):
        guided, step = METHODS[method].make(gmm, problem, operator, y, score, setting)
        prior_key, noise_key = jax.random.split(key)

        def advance(i, x):
            return step(jax.random.fold_in(noise_key, i), guided, SDE, x, ts[i], ts[i + 1])

        x = ss.sample_prior(prior_key, SDE, (gmm.dim,))
        x = jax.lax.fori_loop(0, num_steps, advance, x)
        x0 = ss.denoise(guided, SDE, x, ts[num_steps])
        return jnp.where(problem.mask, x, x0) if METHODS[method].keeps else x0

    return jax.vmap(jax.vmap(one, (None, 0)))(ys, keys)


@partial(jax.jit, static_argnums=0, static_argnames="num")
def run_particles(name, operator, ys, keys, ts, *, num, sigma_data):
    """Particles of each run: x [observations, runs, num, d] and their weights."""
    problem = PROBLEMS[name]
    score = ss.exact_score(load_mixture(problem.mixture), SDE)
    options = {"noise": problem.noise, "num_particles": num, "sigma_data": sigma_data, "ts": ts}

    def one(y, key):
        particles = ss.twisted_smc(key, score, SDE, operator, y, **options)
        return particles.x, particles.weights

    return jax.lax.map(lambda args: jax.vmap(one, (None, 0))(*args), (ys, keys))


@jax.jit
def errors(gmm, posterior, x, weights):
    """Squared errors of weighted draws x [n, d]: mean, covariance, modes."""
    mean = weights @ x
    centred = x - mean[None]
    covariance = jnp.einsum("n,ni,nj->ij", weights, centred, centred)
    modes = weights @ jax.vmap(gmm.responsibilities)(x)  # E[p(k | x) | y] = p(k | y)
    truth = posterior.covariance
    return {
        "mean_error": jnp.sum((mean - posterior.mean) ** 2) / jnp.trace(truth),
        "covariance_error": jnp.sum((covariance - truth) ** 2) / jnp.sum(truth**2),
        "weight_error": (0.5 * jnp.sum(jnp.abs(modes - posterior.weights))) ** 2,
    }


def root_mean_square(gmm, posteriors, x, weights):
    """Over the leading axes, observations and runs, of x [observations, runs, n, d]."""
    per_run = jax.vmap(errors, (None, None, 0, 0))
    squares = jax.vmap(per_run, (None, 0, 0, 0))(gmm, posteriors, x, weights)
    return {key: float(jnp.sqrt(jnp.mean(value))) for key, value in squares.items()}


def solve(name, draws, steps, particles):
    """The lines of a problem."""
    problem = PROBLEMS[name]
    gmm, operator = load_mixture(problem.mixture), problem.operator()
    data_key, draw_key, key = jax.random.split(jax.random.key(SEED), 3)

    def observe(key):
        x_key, noise_key = jax.random.split(key)
        noise = problem.noise * jax.random.normal(noise_key, operator.data_shape)
        return operator(gmm.sample(x_key)) + noise

    ys = jax.vmap(observe)(jax.random.split(data_key, OBSERVATIONS))
    posteriors, noiseless = (
        jax.jit(jax.vmap(lambda y, noise=noise: gmm.posterior(operator, y, noise)))(ys)
        if noise is not None
        else None
        for noise in (problem.noise, None if problem.mask is None else 0.0)
    )
    found = partial(_measured, gmm, draws)
    keys = jax.random.split(draw_key, (OBSERVATIONS, draws))
    x = jax.jit(jax.vmap(lambda law, keys: jax.vmap(law.sample)(keys)))(posteriors, keys)
    yield {"method": "posterior"} | found(posteriors, x)
    ts = {num: ss.log_snr_grid(SDE, num) for num in steps}
    for method, options in METHODS.items():
        if options.keeps and problem.mask is None:
            continue
        truth = noiseless if options.keeps else posteriors
        for setting in options.settings:
            for num in steps:
                grid = jnp.pad(ts[num], (0, max(steps) - num))
                keys = jax.random.split(jax.random.clone(key), (OBSERVATIONS, draws))
                start = time.perf_counter()
                x = jax.block_until_ready(
                    run(name, method, operator, ys, keys, setting, grid, num)
                )
                line = {"method": method, "setting": setting, "steps": num}
                line |= {"evaluations": num * options.evaluations, "backward": options.backward}
                yield line | found(truth, x) | {"seconds": time.perf_counter() - start}
    for num_steps, num in itertools.product(steps[-2:], particles):
        keys = jax.random.split(jax.random.clone(key), (OBSERVATIONS, RUNS))
        x, weights = run_particles(
            name, operator, ys, keys, ts[num_steps], num=num, sigma_data=1.0
        )
        line = {"method": "twisted_smc", "setting": 1.0, "steps": num_steps, "particles": num}
        line |= {"evaluations": num_steps + 1, "backward": True, "runs": RUNS}
        yield line | root_mean_square(gmm, posteriors, x, weights)


def _measured(gmm, draws, posteriors, x):
    weights = jnp.full((OBSERVATIONS, 1, draws), 1.0 / draws)
    return {"draws": draws} | root_mean_square(gmm, posteriors, x[:, None], weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one problem, few draws and steps")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    for name in ("mask_2d",) if quick else PROBLEMS:
        size = (500, (20,), (64,)) if quick else (2_000, STEPS, PARTICLES)
        for line in solve(name, *size):
            line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
            head = context("guidance_bias") | {"seed": SEED, "problem": name}
            print(json.dumps(head | {"noise": PROBLEMS[name].noise} | line), flush=True)
    seconds = {"seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(context("guidance_seconds") | seconds))


if __name__ == "__main__":
    main()
