"""What the samplers cost over a hand-written loop of the same recurrence, for a 128-wide MLP on
10,000 points.

`sample` and `sample_sde` (fixed steps) are compared with one `fori_loop` over a batch;
`sample_ode` (adaptive, per sample) with as many batched evaluations in a loop as its slowest
sample needed. With the batch as the event, all samples of a trained score in one solve, it is
compared with scipy's RK45 calling the jitted drift, and error control of each sample's own with
that. The last line counts compilations.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from scipy.integrate import solve_ivp

import sde_score as ss
from benchmarks._measure import measure, ratio, report

POINTS, STEPS, SHAPE = 10_000, 100, (2,)
SDE = ss.VP()
NET = ss.nets.MLP(width=128, depth=3)


def make_score(key):
    return ss.score_from_noise(SDE, make_network(key))


def make_trained_score(key):
    """Of two moons, in 2,000 steps: how stiff the flow is, and so how many steps it takes, depends
    on the score.
    """
    data_key, init_key, batch_key, fit_key = jax.random.split(key, 4)
    x0 = ss.data.two_moons(data_key, 10_000)
    score = lambda params: ss.score_from_noise(SDE, Partial(NET.apply, params))
    loss = lambda params, key, batch: ss.dsm_loss(key, score(params), SDE, batch)
    batches, optimizer = ss.data.batches(batch_key, x0, 256), optax.adam(1e-3)
    params = NET.init(init_key, x0[0], 1.0)
    state, _ = ss.fit(fit_key, loss, params, optimizer, batches, num_steps=2_000, report=None)
    return score(state.ema_params)


def make_network(key):
    params = NET.init(key, jnp.zeros(SHAPE), 1.0)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    leaves = [x + 0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return Partial(NET.apply, jax.tree.unflatten(structure, leaves))


def hand_written_euler(score_fn, keys):
    """Euler–Maruyama for a whole batch, with nothing around it."""
    ts = jnp.linspace(SDE.t1, SDE.t0, STEPS + 1)
    score = jax.vmap(score_fn, (0, None))

    def body(i, x):
        t, s = ts[i], ts[i + 1]
        h, beta = t - s, SDE.beta_min + t * (SDE.beta_max - SDE.beta_min)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), SHAPE))(keys)
        return x + h * (0.5 * beta * x + beta * score(x, t)) + jnp.sqrt(h * beta) * noise

    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, STEPS), SHAPE))(keys)
    return jax.lax.fori_loop(0, STEPS, body, x)


def hand_written_evaluations(count, score_fn, keys):
    """`count` batched evaluations of the drift in a loop: what an ODE solve costs at least."""
    drift = jax.vmap(partial(ss.reverse_drift, score_fn, SDE, churn=0.0))
    x = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
    # As in the solve, each sample has a time of its own, and a new one each turn: none is hoisted.
    t = jnp.linspace(0.4, 0.5, len(keys))
    return jax.lax.fori_loop(0, count, lambda i, x: x + 1e-3 * drift(x, t + 1e-4 * i), x)


def batch_as_event(sampler):
    """One solve of all samples, with one step size for all."""
    return jax.jit(lambda s, key: sampler(key, jax.vmap(s, (0, None)), SDE, (POINTS, *SHAPE)))


@jax.jit
def drift_of_batch(score_fn, t, x):
    return jax.vmap(lambda x: ss.reverse_drift(score_fn, SDE, x, t, churn=0.0))(x)


def scipy_rk45(score_fn, key):
    """Dormand–Prince by scipy, on the flattened batch, at the tolerances of `sample_ode`."""

    def field(t, x):
        x = np.asarray(x.reshape(POINTS, *SHAPE), np.float32)
        return np.ravel(drift_of_batch(score_fn, np.float32(t), x))

    x = np.ravel(ss.sample_prior(key, SDE, (POINTS, *SHAPE)))
    return solve_ivp(field, (SDE.t1, SDE.t0), x, method="RK45", rtol=1e-5, atol=1e-5)


def batched(sampler, **options):
    one = lambda score_fn, key: sampler(key, score_fn, SDE, SHAPE, **options)
    return jax.jit(lambda score_fn, keys: jax.vmap(one, (None, 0))(score_fn, keys))


def main():
    score_fn = make_score(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), POINTS)
    ts = ss.uniform_grid(SDE, STEPS)
    evaluations = int(batched(ss.solve_ode)(score_fn, keys).num_evals.max())
    functions = {
        "hand_written_euler": jax.jit(hand_written_euler),
        "sample": batched(ss.sample, ts=ts, finish=None),
        "sample_sde": batched(ss.sample_sde, ts=ts, finish=None),
        "hand_written_evaluations": jax.jit(partial(hand_written_evaluations, evaluations)),
        "sample_ode": batched(ss.sample_ode),
    }
    bound = {name: partial(fn, score_fn, keys) for name, fn in functions.items()}
    trained, key = make_trained_score(jax.random.key(0)), jax.random.key(3)
    per_sample = batched(ss.solve_ode)
    bound["scipy_rk45"] = lambda: scipy_rk45(trained, key).y
    bound["one_solve"] = partial(batch_as_event(ss.sample_ode), trained, key)
    bound["per_sample"] = lambda: per_sample(trained, keys).x
    in_one = int(batch_as_event(ss.solve_ode)(trained, key).num_evals)
    slowest = int(per_sample(trained, keys).num_evals.max())
    times = measure(bound, repetitions=5)
    for label, name, reference, evals in (
        ("overhead_sample", "sample", "hand_written_euler", STEPS),
        ("overhead_sample_sde", "sample_sde", "hand_written_euler", STEPS),
        ("overhead_sample_ode", "sample_ode", "hand_written_evaluations", evaluations),
        ("scipy_rk45", "scipy_rk45", "scipy_rk45", scipy_rk45(trained, key).nfev),
        ("one_solve_for_the_batch", "one_solve", "scipy_rk45", in_one),
        ("error_control_per_sample", "per_sample", "one_solve", slowest),
    ):
        report(
            label,
            times[name],
            shape=SHAPE,
            batch=POINTS,
            evaluations=evals,
            ratio_to=reference,
            ratio=round(ratio(times[name], times[reference]), 3),
        )
    before = {name: fn._cache_size() for name, fn in functions.items()}
    for fn in functions.values():
        jax.block_until_ready(fn(make_score(jax.random.key(2)), keys))
    compilations = sum(fn._cache_size() - before[name] for name, fn in functions.items())
    report("compilations_with_new_parameters", times["sample"], count=compilations)


if __name__ == "__main__":
    main()
