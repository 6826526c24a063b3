"""The room that talks to diffrax: evaluations counted, refusals, trajectories, gradients, adaptive
noise.
"""

import dataclasses
import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow

import sde_score as ss
from sde_score._checks import ArgumentError

SDE = ss.VP(beta_min=0.5, beta_max=4.0, t0=5e-2)
KEY = functools.partial(jax.random.key, 0)


def normal_score(x, t):
    return -x * (1.0 + 0.5 * jnp.sin(3.0 * t))


def gaussian():
    covariance = np.array([[[0.6, 0.2], [0.2, 0.4]]])
    return ss.GaussianMixture(np.ones(1), np.array([[0.7, -0.4]]), covariance)


class Counter:
    """A score that counts its evaluations on the host."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t):
        jax.debug.callback(self.hit)
        return normal_score(x, t)

    def hit(self):
        self.calls += 1


def assert_counted(solve, **options):
    score = Counter()
    solution = solve(KEY(), score, SDE, (2,), finish=None, **options)
    jax.effects_barrier()
    assert int(solution.num_evals) == score.calls
    assert score.calls >= 5


ODE_SOLVERS = [
    diffrax.Heun(),
    diffrax.Tsit5(),
    diffrax.Dopri5(),
    diffrax.Dopri8(),
    diffrax.Bosh3(),
]
SDE_SOLVERS = [
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.ShARK(),
    diffrax.SRA1(),
    diffrax.SEA(),
    diffrax.SlowRK(),
]


def name(solver):
    return type(solver).__name__


@pytest.mark.parametrize(
    "solver", [diffrax.Euler(), diffrax.ReversibleHeun(), *ODE_SOLVERS], ids=name
)
def test_evaluations_of_the_flow_on_a_grid(solver):
    assert_counted(ss.solve_ode, solver=solver, ts=ss.uniform_grid(SDE, 5))


@pytest.mark.parametrize("solver", ODE_SOLVERS, ids=name)
def test_evaluations_of_the_adaptive_flow(solver):
    """Rejected steps included: from diffrax's first step of 0.01 on, some are."""
    assert_counted(ss.solve_ode, solver=solver, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", SDE_SOLVERS, ids=name)
def test_evaluations_of_the_reverse_sde_on_a_grid(solver):
    assert_counted(ss.solve_sde, solver=solver, ts=ss.uniform_grid(SDE, 5))


@pytest.mark.diffrax_keys  # a Brownian tree splits its keys again
def test_evaluations_of_the_adaptive_reverse_sde_and_of_finish():
    assert_counted(ss.solve_sde, solver=diffrax.ShARK(), rtol=1e-2, atol=1e-2)
    ts = ss.uniform_grid(SDE, 5)
    assert int(ss.solve_sde(KEY(), normal_score, SDE, (2,), ts=ts).num_evals) == 6


REFUSALS = {
    "an SDE solver on an ODE": (
        lambda: ss.sample_ode(KEY(), normal_score, SDE, (2,), solver=diffrax.ShARK()),
        "`solver` must solve ODEs; got ShARK",
    ),
    "an ODE solver on an SDE": (
        lambda: ss.sample_sde(KEY(), normal_score, SDE, (2,), solver=diffrax.Dopri5()),
        "`solver` must converge for the reverse SDE; got Dopri5",
    ),
    "a Langevin solver": (
        lambda: ss.sample_sde(KEY(), normal_score, SDE, (2,), solver=diffrax.QUICSORT()),
        "`solver` must converge for the reverse SDE; got QUICSORT",
    ),
    "Euler, adaptive, on an ODE": (
        lambda: ss.sample_ode(KEY(), normal_score, SDE, (2,), solver=diffrax.Euler()),
        "`solver` must estimate its error.*Euler does not.*Dopri5",
    ),
    "Euler, adaptive, on an SDE": (
        lambda: ss.sample_sde(KEY(), normal_score, SDE, (2,), solver=diffrax.Euler(), rtol=1e-2),
        "`solver` must estimate its error.*Euler does not.*ShARK",
    ),
    "a coarse Brownian tree": (
        lambda: ss.sample_sde(
            KEY(), normal_score, SDE, (2,), ts=ss.uniform_grid(SDE, 10), brownian_tol=0.1
        ),
        "`brownian_tol` must be at most half the shortest step, 0.0475; got 0.1",
    ),
    "a negative Brownian tolerance": (
        lambda: ss.sample_sde(KEY(), normal_score, SDE, (2,), brownian_tol=-1.0),
        "`brownian_tol` must be finite and above 0",
    ),
    "steps halved for their error": (
        lambda: ss.sample_ode(
            KEY(), normal_score, SDE, (2,), solver=diffrax.HalfSolver(diffrax.Heun())
        ),
        "`solver` must not be a HalfSolver",
    ),
    "an implicit solver without tolerances": (
        lambda: ss.sample_ode(
            *(KEY(), normal_score, SDE, (2,)),
            **{"solver": diffrax.Kvaerno3(), "ts": ss.uniform_grid(SDE, 4)},
        ),
        "`solver` must know its tolerances on a grid; Kvaerno3",
    ),
    "an SDE that is no pytree": (
        lambda: ss.sample_ode(KEY(), normal_score, Unregistered(), (2,)),
        "`sde` must be a pytree.*register_pytree",
    ),
    "rtol of 0": (
        lambda: ss.sample_ode(KEY(), normal_score, SDE, (2,), rtol=0.0),
        "`rtol` must be finite and above 0; got 0.0",
    ),
    "atol below 0": (
        lambda: ss.sample_sde(KEY(), normal_score, SDE, (2,), atol=-1e-3),
        "`atol` must be finite and above 0",
    ),
    "rtol that float32 cannot reach": (
        lambda: ss.sample_ode(KEY(), normal_score, SDE, (2,), rtol=1e-9),
        "`rtol` must be at least .* roundings of float32; got 1e-09.*float64",
    ),
    "no steps": (
        lambda: ss.sample_ode(KEY(), normal_score, SDE, (2,), max_steps=0),
        "`max_steps`",
    ),
    "saveat outside": (
        lambda: ss.solve_ode(KEY(), normal_score, SDE, (2,), saveat=jnp.array([0.5, 0.01])),
        "`saveat` must be an array of times in the solve.s order",
    ),
    "saveat increasing": (
        lambda: ss.solve_ode(KEY(), normal_score, SDE, (2,), saveat=jnp.array([0.5, 0.6])),
        "`saveat` must be an array of times in the solve.s order",
    ),
    "a flow's grid the wrong way round": (
        lambda: ss.probability_flow(
            normal_score, SDE, jnp.ones(2), start=SDE.t0, stop=SDE.t1, ts=ss.uniform_grid(SDE, 4)
        ),
        "`ts` must be a grid that runs from start=0.05.* to stop=1.0",
    ),
    "a flow's time outside": (
        lambda: ss.probability_flow(normal_score, SDE, jnp.ones(2), start=0.0, stop=SDE.t1),
        "`start` must lie in",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_converge_is_refused(case):
    run, words = REFUSALS[case]
    with pytest.raises(ArgumentError, match=words):
        run()


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit and vmap"])
def test_a_solve_that_runs_out_of_steps_says_so(jitted):
    run = lambda key: ss.sample_ode(key, normal_score, SDE, (2,), max_steps=3)  # noqa: E731
    keys = jax.random.split(KEY(), 2)
    with pytest.raises(RuntimeError, match="did not reach its end within max_steps=3: raise"):
        jax.block_until_ready(jax.jit(jax.vmap(run))(keys) if jitted else run(keys[0]))


@pytest.mark.parametrize("name", ["trajectory", "num_evals"])
def test_no_part_of_an_unfinished_solution_is_returned(name):
    """Under jit the check would be dropped with a result that is not used."""
    saveat = jnp.array([0.5, SDE.t0])
    run = jax.jit(
        lambda key: getattr(
            ss.solve_ode(key, normal_score, SDE, (2,), max_steps=3, saveat=saveat), name
        )
    )
    with pytest.raises(RuntimeError, match="did not reach its end within max_steps=3: raise"):
        jax.block_until_ready(run(KEY()))


def test_a_root_finder_that_fails_on_a_grid_says_so():
    """Its solve would end at an intermediate time."""
    finder = diffrax.VeryChord(1e-6, 1e-6)
    run = lambda score: ss.sample_ode(  # noqa: E731
        *(KEY(), score, SDE, (2,)),
        **{"ts": ss.uniform_grid(SDE, 5), "solver": diffrax.ImplicitEuler(root_finder=finder)},
    )
    assert np.isfinite(run(normal_score)).all()
    with pytest.raises(RuntimeError, match="root finder did not converge on the grid"):
        jax.block_until_ready(run(lambda x, t: 30.0 * jnp.sin(40.0 * x)))


@pytest.mark.diffrax_keys  # a Brownian tree splits its keys again
@pytest.mark.slow
def test_the_brownian_tree_resolves_what_it_must_by_default():
    """Half the shortest step of a grid; 1e-5 where steps adapt."""
    ts = ss.log_snr_grid(SDE, 6)
    finest = 0.5 * jnp.min(-jnp.diff(ts))
    adjoint = {"adjoint": diffrax.RecursiveCheckpointAdjoint()}
    for options, tol in (({"ts": ts} | adjoint, finest), ({"rtol": 1e-2}, 1e-5)):
        default = ss.sample_sde(KEY(), normal_score, SDE, (2,), **options)
        stated = ss.sample_sde(KEY(), normal_score, SDE, (2,), **options, brownian_tol=tol)
        np.testing.assert_array_equal(default, stated)


@pytest.mark.diffrax_keys  # a Brownian tree splits its keys again
def test_a_brownian_tree_too_coarse_is_refused_in_a_program_too():
    """An adaptive step that would be shorter than the tree resolves, and a grid under jit."""
    options = {"rtol": 1e-2, "brownian_tol": 0.3}
    with pytest.raises(RuntimeError, match="did not reach its end.*lower `brownian_tol`"):
        jax.block_until_ready(ss.sample_sde(KEY(), stiff_score, SDE, (2,), **options))

    @jax.jit
    def run(sde, tol):
        ts = ss.uniform_grid(sde, 5)
        return ss.sample_sde(KEY(), normal_score, sde, (2,), ts=ts, brownian_tol=tol)

    assert np.isfinite(run(SDE, 0.05)).all()
    words = "`brownian_tol` must be at most half the shortest"
    with pytest.raises((RuntimeError, ValueError), match=words):
        jax.block_until_ready(run(SDE, 0.5))


def stiff_score(x, t):
    return -x / (0.001 + t)


def test_two_sdes_of_equally_many_fields_never_share_a_program():
    """jaxlib 0.10.2 takes registered dataclasses with equally many fields for the same structure:
    diffrax's inner jit then ran VP's program for a VE (both have four).
    """
    x, score = jnp.array([0.3, -0.4]), ss.exact_score
    for sde in (SDE, ss.VE(sigma_min=0.1, sigma_max=5.0, t0=5e-2), Other()):
        move = lambda x, score, sde: ss.probability_flow(  # noqa: E731
            score, sde, x, start=sde.t1, stop=sde.t0, ts=ss.uniform_grid(sde, 64)
        )
        run = jax.jit(jax.vmap(move, in_axes=(0, None, None)))
        moved = run(x[None], score(gaussian(), sde), sde)[0]
        exact = ss.gaussian_flow(gaussian(), sde, x, sde.t1, sde.t0)
        # 64 steps of a fifth-order method: float32 rounding.
        np.testing.assert_allclose(moved, exact, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Unregistered(ss.VP):
    """Its parent's registration does not cover it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Other:
    """dx = √(2 rate) scale dw with sigma² = 2 rate scale² t: four fields, as VP and VE have."""

    rate: float = 1.5
    scale: float = 0.8
    t0: float = 5e-2
    t1: float = 1.0

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return self.scale * jnp.sqrt(2.0 * self.rate * t)

    def drift(self, x, t):
        return jnp.zeros_like(x)

    def diffusion(self, t):
        return self.scale * jnp.sqrt(2.0 * self.rate) * jnp.ones_like(t)


def test_trajectories_pass_through_the_closed_form(x64):
    gmm, init = gaussian(), jnp.array([1.2, -0.7])
    score, options = ss.exact_score(gmm, SDE), {"init": init, "finish": None}
    run = lambda **steps: ss.solve_ode(KEY(), score, SDE, (2,), **options, **steps)
    flow = jax.vmap(lambda t: ss.gaussian_flow(gmm, SDE, init, SDE.t1, t))
    ts = ss.uniform_grid(SDE, 40)
    at_nodes = run(ts=ts, saveat=ts[1:])
    # 40 steps of Dormand–Prince at h = 0.024: h^5 is 1e-8, and the constants are of order one.
    np.testing.assert_allclose(at_nodes.trajectory, flow(ts[1:]), atol=1e-7)
    # The end of the last step, interpolated: float64 rounding.
    np.testing.assert_allclose(at_nodes.trajectory[-1], at_nodes.x, rtol=1e-13)

    between = jnp.array([0.83, 0.41, 0.06])
    adaptive = run(rtol=1e-9, atol=1e-9, saveat=between)
    # Dense output is of fourth order: below the steps' own accuracy.
    np.testing.assert_allclose(adaptive.trajectory, flow(between), atol=1e-5)
    np.testing.assert_allclose(adaptive.x, flow(jnp.array([SDE.t0]))[0], atol=1e-7)


def test_trajectories_of_the_reverse_sde():
    ts = ss.uniform_grid(SDE, 8)
    solution = ss.solve_sde(
        KEY(), normal_score, SDE, (2,), ts=ts, saveat=ts[jnp.array([0, 4, 8])], finish=None
    )
    first = ss.sample_prior(jax.random.split(KEY())[0], SDE, (2,))
    np.testing.assert_array_equal(solution.trajectory[0], first)
    np.testing.assert_array_equal(solution.trajectory[2], solution.x)
    assert np.all(np.isfinite(solution.trajectory))
    assert ss.solve_sde(KEY(), normal_score, SDE, (2,), ts=ts).trajectory is None


@pytest.mark.diffrax_keys  # a Brownian tree splits its keys again
@pytest.mark.parametrize("run", [ss.sample_sde, slow(ss.sample_ode)])
def test_gradients_pass_through_with_an_adjoint(run, x64):
    """In a parameter of the score, against central differences along the same noise."""
    ts = ss.uniform_grid(SDE, 8)

    @jax.jit
    def loss(scale):
        score = jax.tree_util.Partial(lambda scale, x, t: -scale * jnp.tanh(x), scale)
        adjoint = diffrax.RecursiveCheckpointAdjoint()
        x = run(KEY(), score, SDE, (2,), ts=ts, adjoint=adjoint, finish=None)
        return jnp.sum(x**2)

    eps, scale = 1e-5, jnp.float64(0.8)
    difference = (loss(scale + eps) - loss(scale - eps)) / (2 * eps)
    # Central differences: eps² = 1e-10 and rounding 1e-16/eps = 1e-11, relative to order one.
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(scale), difference, rtol=1e-7)


@pytest.mark.diffrax_keys  # a Brownian tree splits its keys again
@pytest.mark.slow
def test_the_adaptive_reverse_sde_has_the_right_law():
    """Mean and covariance of p_t0 within 5 standard errors, the solver's error (rtol = 1e-2, of
    some 1e-3 in each path) negligible beside them.
    """
    gmm, count = gaussian(), 2_000
    start, final = (ss.marginal(gmm, SDE, t) for t in (SDE.t1, SDE.t0))

    def draw(key, start, score_fn, sde):
        start_key, key = jax.random.split(key)
        init = start.sample(start_key)
        options = {"init": init, "rtol": 1e-2, "atol": 1e-2, "finish": None}
        return ss.sample_sde(key, score_fn, sde, (2,), **options)

    keys = jax.random.split(jax.random.key(8), count)
    run = jax.jit(jax.vmap(draw, in_axes=(0, None, None, None)))
    centred = np.asarray(run(keys, start, ss.exact_score(gmm, SDE), SDE) - final.means, np.float64)
    products = np.stack(
        [centred[:, 0], centred[:, 1], centred[:, 0] ** 2, centred[:, 0] * centred[:, 1],
         centred[:, 1] ** 2], axis=1,
    )  # fmt: skip
    c = final.covariances[0]
    expected = np.array([0.0, 0.0, c[0, 0], c[0, 1], c[1, 1]])
    stderr = products.std(axis=0, ddof=1) / np.sqrt(count)
    z = (products.mean(axis=0) - expected) / stderr
    print("adaptive ShARK, deviations in standard errors:", z.round(2))
    assert np.all(np.abs(z) < 5)
