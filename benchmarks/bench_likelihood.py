"""What a likelihood costs.

First the time of one batch's likelihoods on a fixed grid, relative to one probe's, against the
dimension d: Hutchinson's trace with M probes takes M Jacobian products an evaluation, the exact
one d. Then, relative to samples of the probability flow by as many evaluations on the same grid,
for one probe; the goal is at most 2. Last, the temporary memory of the compiled gradient of
`flow_loss` by each adjoint, against the number of steps that the solver may take.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

import sde_score as ss
from benchmarks._measure import context, measure, ratio

DIMENSIONS, PROBES, BATCH, STEPS = (2, 8, 32, 128), (1, 4, 16), 128, 8
SAMPLES = 1_000  # of the comparison with sampling
LIMITS, TRAINED_DIM = (16, 64, 256, 1024), 8  # of the memory: steps, and the flow's dimension
SDE = ss.VP(t0=1e-3)
NET = ss.nets.MLP(width=128, depth=3)
ADJOINTS = {
    "checkpoint": diffrax.RecursiveCheckpointAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
    "direct": diffrax.DirectAdjoint(),
}


def make_params(dim):
    """The last layer starts at 0: move it, or half of the work could be skipped."""
    params = NET.init(jax.random.key(0), jnp.zeros(dim), 1.0)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def make_score(params):
    return ss.score_from_preconditioned(SDE, Partial(NET.apply, params), sigma_data=1.0)


def batched(one):
    """`one(key, score_fn, x)` over a batch, the network's parameters an argument."""
    many = jax.vmap(lambda key, params, x: one(key, make_score(params), x), (0, None, 0))
    return jax.jit(many)


def solves(dim, probes):
    """What is timed in `dim` dimensions, by name: every solve on the same grid."""
    ts = ss.log_snr_grid(SDE, STEPS)
    named = {
        "sample": lambda key, score, x: ss.solve_ode(key, score, SDE, (dim,), ts=ts, init=x),
        "exact": lambda _, score, x: ss.exact_log_likelihood(score, SDE, x, ts=ts),
    }
    for count in probes:
        named[f"probes_{count}"] = lambda key, score, x, count=count: ss.log_likelihood(
            key, score, SDE, x, ts=ts, num_probes=count
        )
    return {name: batched(one) for name, one in named.items()}


def arguments(dim, batch):
    key = jax.random.key(2)
    return jax.random.split(key, batch), make_params(dim), jax.random.normal(key, (batch, dim))


def cost_of_the_trace(dim, repetitions):
    functions = solves(dim, PROBES)
    del functions["sample"]
    args = arguments(dim, BATCH)
    times = measure({name: partial(fn, *args) for name, fn in functions.items()}, repetitions)
    for name, time in times.items():
        cost = round(ratio(time, times["probes_1"]), 3)
        fields = {"dim": dim, "batch": BATCH, "steps": STEPS, "trace": name}
        yield timed("likelihood", time, **fields, ratio_to="probes_1", ratio=cost)


def cost_beside_sampling(dim, repetitions):
    functions, args = solves(dim, (1,)), arguments(dim, SAMPLES)
    del functions["exact"]
    evaluations = {int(fn(*args).num_evals.max()) for fn in functions.values()}
    assert len(evaluations) == 1, evaluations
    times = measure({name: partial(fn, *args) for name, fn in functions.items()}, repetitions)
    cost = round(ratio(times["probes_1"], times["sample"]), 3)
    fields = {"dim": dim, "batch": SAMPLES, "evaluations": evaluations.pop()}
    yield timed(
        "likelihood_beside_sampling", times["probes_1"], **fields, ratio_to="sample", ratio=cost
    )


def memory_of_the_gradient(limit):
    _, params, x = arguments(TRAINED_DIM, BATCH)
    for name, adjoint in ADJOINTS.items():

        def loss(params, key, x, adjoint=adjoint):
            field = ss.probability_flow_field(make_score(params), SDE)
            ends = {"start": SDE.t0, "stop": SDE.t1}
            return ss.flow_loss(key, field, x, adjoint=adjoint, max_steps=limit, **ends)

        compiled = jax.jit(jax.grad(loss)).lower(params, jax.random.key(3), x).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        fields = {"adjoint": name, "max_steps": limit, "dim": TRAINED_DIM, "batch": BATCH}
        yield context("flow_gradient_memory") | fields | {"temp_mib": round(size / 2**20, 2)}


def timed(name, measurement, **fields):
    seconds = {"compile_s": measurement.compile_s, "median_s": measurement.median_s}
    return context(name) | {key: round(value, 5) for key, value in seconds.items()} | fields


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--limits", type=int, nargs="+", default=LIMITS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file for the JSON lines")
    options = parser.parse_args()
    measurements = [(cost_of_the_trace, dim, options.repetitions) for dim in options.dims]
    measurements += [(cost_beside_sampling, dim, options.repetitions) for dim in options.dims]
    measurements += [(memory_of_the_gradient, limit) for limit in options.limits]
    lines = []
    for function, *args in measurements:
        for line in function(*args):
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
