"""Which sampler, and how many steps? Error against the number of score evaluations, where the
truth is known.

Every sampler takes the same exact draws of p_t1 of a Gaussian mixture to t0, by the exact score,
in float64: nothing but the sampler is at fault. t0 is 1e-3 (VP, sub-VP) or where sigma is 0.01
(VE). There is no denoising at the end: here another step is worth more than that evaluation.
What `fit_grid` spends once on a grid is not counted.

The floor of an error (see `_mixtures`) is what exact draws make of it, on average and at worst
over 20 repeats. A sampler has reached it where its `sw2` is at most the worst of these, with two
budgets in succession; it is measured no further.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sde_score as ss
from benchmarks import _mixtures
from benchmarks._measure import context
from benchmarks._sampler_figure import figure
from sde_score import plots
from sde_score._typing import bind

SEED, REPEATS = 0, 20
BUDGETS = (6, 8, 12, 16, 20, 30, 50, 100, 200)
FEW = (20, 50, 100, 200)  # for what compiles anew for each number of steps
TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5)
SDES = {"vp": ss.VP(t0=1e-3), "sub_vp": ss.SubVP(t0=1e-3), "ve": ss.VE()}
GRIDS = {"uniform": ss.uniform_grid, "log_snr": ss.log_snr_grid, "karras": ss.karras_grid}


class Sampler(NamedTuple):
    """`draw(key, score_fn, sde, grid, setting, x)` takes x [n, d] at t1 to samples and the number
    of evaluations, [] or [n]. A setting is a number of evaluations, or a tolerance.
    """

    draw: Callable
    grids: tuple[str, ...] = tuple(GRIDS)
    settings: tuple[float, ...] = BUDGETS


def along(method, cost=1):
    """A `Step` or a `Multistep` of `cost` evaluations a step."""
    return Sampler(partial(_along, lambda num_steps: method, cost))


def _along(make, cost, key, score_fn, sde, grid, budget, x):
    num_steps = budget // cost
    ts = grid(sde, num_steps)
    padded = jnp.pad(ts, (0, max(BUDGETS) + 1 - ts.size))
    x = _run(key, score_fn, sde, _with_memory(make(num_steps)), padded, num_steps, x)
    return x, num_steps * cost


def _with_memory(method):
    if isinstance(method, ss.Multistep):
        return method
    return ss.Multistep(bind(_no_state), bind(_stateless, method))


def _no_state(x):
    return ()


def _stateless(step, *args):
    return step(*args[:-1]), ()


@jax.jit
def _run(key, score_fn, sde, method, ts, num_steps, x):
    """`sample_multistep` along the first steps of ts: one program for any number of them."""

    def one(key, x):
        def advance(i, carry):
            x, state = carry
            noise = jax.random.fold_in(key, i)
            return method.step(noise, score_fn, sde, x, ts[i], ts[i + 1], state)

        return jax.lax.fori_loop(0, num_steps, advance, (x, method.init(x)))[0]

    return jax.vmap(one)(jax.random.split(key, len(x)), x)


def churned(churn):
    """`edm_stochastic` with EDM's gamma = min(churn/N, √2 − 1) for N steps."""
    make = lambda num_steps: ss.edm_stochastic(min(churn / num_steps, math.sqrt(2.0) - 1.0))
    return Sampler(partial(_along, make, 2))


def fitted(method):
    """`method` along the grid that `fit_grid` makes for it, this score and this many steps."""
    return Sampler(partial(_fitted, method), ("fitted",), (6, 8, 12))


def _fitted(method, key, score_fn, sde, _, budget, x):
    fit_key, key = jax.random.split(key)
    ts = _fit(fit_key, score_fn, sde, method, budget, x.shape[1:])
    return _along(lambda _: method, 1, key, score_fn, sde, lambda *_: ts, budget, x)


@partial(jax.jit, static_argnames=("num_steps", "shape"))
def _fit(key, score_fn, sde, method, num_steps, shape):
    sampler = partial(ss.sample_multistep, method=method, finish=None)
    return ss.fit_grid(key, score_fn, sde, shape, num_steps, sampler=sampler)


def annealed_langevin(moves, step_size):
    """`moves` of Langevin dynamics at each level, with ε = step_size sigma(t)²."""
    return Sampler(partial(_annealed, moves, step_size), settings=FEW)


def _annealed(moves, step_size, key, score_fn, sde, grid, budget, x):
    ts = grid(sde, budget // moves - 1)
    step_size = step_size * sde.sigma(sde.t0) ** 2
    options = {"ts": ts, "num_steps": moves, "step_size": step_size, "finish": None}
    x = _vmapped(ss.annealed_langevin_sample, key, score_fn, sde, x, **options)
    return x, budget // moves * moves


def fixed_sde(solver):
    """`solve_sde` along a grid, for solvers of two evaluations a step."""
    return Sampler(partial(_fixed_sde, solver), settings=FEW)


def _fixed_sde(solver, key, score_fn, sde, grid, budget, x):
    options = {"solver": solver, "ts": grid(sde, budget // 2), "finish": None}
    solution = _vmapped(ss.solve_sde, key, score_fn, sde, x, **options)
    return solution.x, solution.num_evals


def adaptive_ode(solver):
    """`solve_ode` to a tolerance, relative and absolute, each sample by steps of its own."""
    return Sampler(partial(_adaptive_ode, solver), ("adaptive",), TOLERANCES)


def _adaptive_ode(solver, key, score_fn, sde, _, tolerance, x):
    options = {"solver": solver, "rtol": tolerance, "atol": tolerance}
    solution = _vmapped(ss.solve_ode, key, score_fn, sde, x, **options)
    return solution.x, solution.num_evals


@partial(jax.jit, static_argnames=("draw", "solver", "num_steps", "finish"))
def _vmapped(draw, key, score_fn, sde, x, **options):
    one = lambda key, x: draw(key, score_fn, sde, x.shape, init=x, **options)
    return jax.vmap(one)(jax.random.split(key, len(x)), x)


SAMPLERS = {
    "euler_maruyama": along(ss.euler_maruyama),
    "reverse_diffusion": along(ss.reverse_diffusion),
    "ancestral": along(ss.ancestral),
    "ancestral_beta": along(ss.ancestral_beta),
    "ddim_eta_half": along(ss.ddim_eta(0.5)),
    "predictor_corrector": along(ss.predictor_corrector(ss.ancestral, ss.langevin(0.16)), cost=2),
    "annealed_langevin": annealed_langevin(moves=2, step_size=1.0),
    "shark": fixed_sde(diffrax.ShARK()),
    "sra1": fixed_sde(diffrax.SRA1()),
    "edm_stochastic": churned(1.0),
    "sde_dpm_solver_pp": along(ss.sde_dpm_solver_pp()),
    "ddim": along(ss.ddim),
    "heun": along(ss.heun, cost=2),
    "dopri5": adaptive_ode(diffrax.Dopri5()),
    "dpm_solver_pp_2m": along(ss.dpm_solver_pp(2)),
    "dpm_solver_pp_3m": along(ss.dpm_solver_pp(3)),
    "unipc": along(ss.unipc(2)),
    "adams": along(ss.adams(3)),
    "adams_fitted": fitted(ss.adams(3)),
}
SOME = (
    *("euler_maruyama", "ancestral", "sde_dpm_solver_pp", "ddim", "heun", "dopri5"),
    *("dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc", "adams"),
)
FEWER = ("euler_maruyama", "ddim", "dpm_solver_pp_2m", "unipc", "adams", "adams_fitted")


class Problem(NamedTuple):
    """A mixture under an SDE. A sampler draws `sets` times `points`, at most at `largest`
    evaluations; on the grid that is best at `screen`, on every grid where that is None.
    """

    mixture: str
    sde: str = "vp"
    sets: int = 4
    points: int = 10_000
    largest: int = 200
    screen: int | None = None
    samplers: tuple[str, ...] = tuple(SAMPLERS)


PROBLEMS = (
    Problem("mixture_2d"),
    Problem("mixture_2d", "sub_vp", screen=20, samplers=SOME),
    Problem("mixture_2d", "ve", screen=20, samplers=SOME),
    Problem("mixture_16d", sets=1, screen=20),
    Problem("mixture_128d", sets=1, largest=50, screen=12, samplers=FEWER),
)
QUICK = (Problem("mixture_2d", sets=1, points=1_000, largest=20, screen=8, samplers=SOME[-6:]),)


def mixture(name):
    return _mixtures.make_mixture(128) if name == "mixture_128d" else _mixtures.load_mixture(name)


def solve(problem):
    """The lines of a problem: its floor's, each measurement's, and one for each sampler."""
    gmm, sde = mixture(problem.mixture), SDES[problem.sde]
    shape = (problem.sets, problem.points)
    truth_key, floor_key, start_key, key = jax.random.split(jax.random.key(SEED), 4)
    truth = _mixtures.make_truth(truth_key, gmm, problem.points)
    common = {"mixture": problem.mixture, "sde": problem.sde, "sets": shape[0], "points": shape[1]}
    floor = _floor(floor_key, truth, gmm, shape)
    yield {"name": "sampler_floor"} | common | floor
    start = _mixtures.exact_draws(start_key, ss.marginal(gmm, sde, sde.t1), shape)
    score_fn, start = ss.exact_score(gmm, sde), jnp.reshape(start, (-1, gmm.dim))

    def measure(sampler, grid, setting):
        noise_key = jax.random.clone(key)  # common random numbers
        x, count = sampler.draw(noise_key, score_fn, sde, GRIDS.get(grid), setting, start)
        found = {"grid": grid, "setting": setting, "evaluations": round(float(np.mean(count)), 1)}
        found |= {"most_evaluations": int(np.max(count))}
        return found | _mixtures.errors(truth, np.asarray(x).reshape(*shape, gmm.dim))

    for name in problem.samplers:
        line, best = common | {"sampler": name}, None
        for rows in _curves(partial(measure, SAMPLERS[name]), SAMPLERS[name], problem, floor):
            yield from ({"name": "sampler_error"} | line | row for row in rows)
            found = _reached(rows, floor)
            best = found if best is None else min(best, found, key=_rank)
        yield {"name": "sampler_to_floor"} | line | best


def _floor(key, truth, gmm, shape):
    """The errors of exact draws, mean and worst; `pair` is `sw2` of two single sets."""
    rows = []
    for pair_keys in jax.random.split(key, (REPEATS, 2)):
        draws, other = (_mixtures.exact_draws(key, gmm, shape) for key in pair_keys)
        pair = _mixtures.distance_of_a_pair(truth, draws[0], other[0])
        rows.append(_mixtures.errors(truth, draws) | {"pair": pair})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {f"{k}_mean": float(np.mean(v)) for k, v in columns.items()} | {
        f"{k}_worst": max(v) for k, v in columns.items()
    }


def _curves(measure, sampler, problem, floor):
    """The measurements along each grid, from few evaluations on until two are at the floor."""
    settings = [setting for setting in sampler.settings if setting <= problem.largest]
    grids = sampler.grids
    if problem.screen and len(grids) > 1:
        screen = min(setting for setting in settings if setting >= problem.screen)
        grids = [min(grids, key=lambda grid: _error(measure(grid, screen)))]
    for grid in grids:
        rows = []
        for setting in settings:
            rows.append(measure(grid, setting))
            if len(rows) > 1 and max(map(_error, rows[-2:])) <= floor["sw2_worst"]:
                break
        yield rows


def _reached(rows, floor):
    """The first measurement from which on a curve is at the floor, else its last."""
    last = {"reached": _error(rows[-1]) <= floor["sw2_worst"]} | rows[-1]
    if last["reached"] and len(rows) > 1 and _error(rows[-2]) <= floor["sw2_worst"]:
        last |= rows[-2]
    return {key: last[key] for key in ("reached", "grid", "evaluations", "sw2")}


def _rank(found):
    return not found["reached"], found["evaluations"] if found["reached"] else _error(found)


def _error(row):
    return row["sw2"] if math.isfinite(row["sw2"]) else math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six samplers on one mixture")
    parser.add_argument("--out", type=Path, help="a folder for samplers.json and samplers.png")
    arguments = parser.parse_args()
    lines, start = [], time.perf_counter()
    with jax.enable_x64(True):
        for problem in QUICK if arguments.quick else PROBLEMS:
            for line in solve(problem):
                lines.append(context(line.pop("name"), "float64") | {"seed": SEED} | _plain(line))
                print(json.dumps(lines[-1]), flush=True)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    print(json.dumps(context("sampler_seconds") | _plain(seconds)))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "samplers.json").write_text(json.dumps(lines, indent=1) + "\n")
        plots.save(figure(lines), arguments.out / "samplers.png")


def _plain(line):
    """Four digits, and null where a method diverged: JSON has no nan."""
    digits = lambda value: float(f"{value:.4g}") if math.isfinite(value) else None
    return {k: digits(v) if isinstance(v, float) else v for k, v in line.items()}


if __name__ == "__main__":
    main()
