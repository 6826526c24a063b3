"""Continuous normalizing flows against closed forms; the adjoints against each other; FFJORD's
network.
"""

import dataclasses
import functools

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mixture
from jax.tree_util import Partial
from scipy.linalg import expm
from test_sde import within

import sde_score as ss
from sde_score._checks import ArgumentError
from sde_score.nets import ConcatSquash

KEY = functools.partial(jax.random.key, 0)
X = jnp.array([0.3, -0.4])
TIMES = [(0.2, 1.5), (1.1, 0.3)]  # the data may lie at either end
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def spin(a, x, t):
    """dx/dt = 2t A x, carried from s to t by exp((t² − s²) A)."""
    return 2.0 * t * (a @ x)


def linear_flow():
    """A matrix that is neither symmetric nor free of trace, a point, and all of it in closed form:
    (start, stop) -> x at the end, log p of x, the integral of the divergence.
    """
    a = np.array([[0.4, -1.0, 0.2], [0.7, 0.5, -0.3], [-0.2, 0.6, 0.3]])
    x = np.array([0.5, -1.2, 0.8])

    def truth(start, stop):
        latent = expm((stop**2 - start**2) * a) @ x
        change = (stop**2 - start**2) * np.trace(a)
        return latent, -0.5 * latent @ latent - 1.5 * np.log(2 * np.pi) + change, change

    return Partial(spin, jnp.asarray(a)), jnp.asarray(x), truth


def test_a_linear_flow_has_its_closed_form(x64):
    """Density, latent and the inverse map, to the tolerance of the solver; 1e-10 an error each
    step.
    """
    field, x, truth = linear_flow()

    @jax.jit
    def run(field, start, stop):
        ends = {"start": start, "stop": stop, **TIGHT}
        out = ss.exact_flow_log_prob(field, x, **ends)
        drawn = ss.sample_flow(KEY(), field, (3,), **ends)
        return out, ss.sample_flow(KEY(), field, (3,), init=out.latent, **ends), drawn

    for start, stop in TIMES:
        out, back, drawn = run(field, start, stop)
        latent, log_prob, _ = truth(start, stop)
        np.testing.assert_allclose(out.log_prob, log_prob, atol=1e-8)
        np.testing.assert_allclose(out.latent, latent, atol=1e-8)
        np.testing.assert_allclose(back, x, atol=1e-8)
        carry = expm((start**2 - stop**2) * np.asarray(field.args[0]))
        np.testing.assert_allclose(drawn, carry @ jax.random.normal(KEY(), (3,)), atol=1e-7)
        assert out.stderr == 0 and out.num_evals > 50


def test_hutchinson_within_its_error_bar(x64):
    """Over 2,000 keys: the mean is the closed form, and the error bar the spread about it, to the
    2 % or so of a spread's own error, times 5.
    """
    field, x, truth = linear_flow()
    options = {"num_probes": 4, "probes": ss.gaussian_probes, "rtol": 1e-6, "atol": 1e-6}
    ends = dict(zip(("start", "stop"), TIMES[0], strict=True))
    run = jax.vmap(lambda key: ss.flow_log_prob(key, field, x, **ends, **options))
    out = jax.jit(run)(jax.random.split(KEY(), 2_000))
    within(out.log_prob, truth(*TIMES[0])[1])
    np.testing.assert_allclose(np.mean(out.stderr**2), np.var(out.log_prob), rtol=0.15)


def bend(params, x, t):
    return params["out"] @ jnp.tanh(params["in"] @ x + params["time"] * t)


def bent_field():
    rng = np.random.default_rng(0)
    shapes = {"in": (5, 2), "time": (5,), "out": (2, 5)}
    return {name: jnp.asarray(0.7 * rng.normal(size=shape)) for name, shape in shapes.items()}


ADJOINTS = {
    "recursive": diffrax.RecursiveCheckpointAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
    "direct": diffrax.DirectAdjoint(),
}


@pytest.mark.slow
def test_adjoints_agree_and_with_central_differences(x64):
    """Gradients of −log p by parameters and point. The differences, over 2e-4, have an error of
    some 1e-8 by their formula and 1e-6 by the solver, whose errors on either side nearly cancel.
    """
    params, x = bent_field(), jnp.array([0.6, -1.1])

    def loss(adjoint, params, x):
        field = Partial(bend, params)
        options = {"rtol": 1e-8, "atol": 1e-8, "max_steps": 64, "probes": ss.gaussian_probes}
        return ss.flow_loss(KEY(), field, x[None], adjoint=adjoint, **options)

    grads = {
        name: jax.jit(jax.value_and_grad(functools.partial(loss, adjoint), argnums=(0, 1)))
        for name, adjoint in ADJOINTS.items()
    }
    value, grad = grads["recursive"](params, x)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    for name in ("backsolve", "direct"):
        found, other = grads[name](params, x)
        error = np.linalg.norm(flat(other) - flat(grad)) / np.linalg.norm(flat(grad))
        print(f"{name}: the gradients differ by {error:.1e}")
        assert error < 1e-5 and abs(found - value) < 1e-10
    rng, step = np.random.default_rng(1), 1e-4
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (params, x))
    ahead, behind = (
        grads["recursive"](
            *jax.tree.map(lambda p, d, s=sign * step: p + s * d, (params, x), along)
        )
        for sign in (1.0, -1.0)
    )
    slope = (ahead[0] - behind[0]) / (2 * step)
    np.testing.assert_allclose(flat(grad) @ flat(along), slope, rtol=1e-5)


def test_a_trajectory_and_its_gradient(x64):
    """The states at `saveat`, the end among them, and BacksolveAdjoint's gradient through all of
    them are those of the matrix exponential, to the interpolation between steps.
    """
    field, x, _ = linear_flow()
    start, stop = TIMES[0]
    saveat = jnp.array([0.5, 1.1, stop])

    def total(states, end):
        return jnp.sum(jnp.sin(states)) + jnp.sum(end**2), states

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def solved(field):
        options = {"saveat": saveat, "adjoint": diffrax.BacksolveAdjoint(), **TIGHT}
        solution = ss.integrate(field, x, start=start, stop=stop, **options)
        return total(solution.trajectory, solution.x)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def exact(field):
        carry = jax.vmap(lambda t: jax.scipy.linalg.expm((t**2 - start**2) * field.args[0]) @ x)
        states = carry(saveat)
        return total(states, states[-1])

    chex.assert_trees_all_close(solved(field), exact(field), rtol=1e-6, atol=1e-6)


def basis_probes(key, num, shape):
    """√d e_i: their mean is the exact trace."""
    return jnp.tile(jnp.sqrt(2.0) * jnp.eye(2), (num // 2, 1)).reshape(num, *shape)


def test_a_probability_flow_is_such_a_flow(x64):
    """Its density by any field's functions is the model's and the oracle's log p_t0."""
    sde, gmm = ss.VP(t0=1e-3), ss.GaussianMixture(*mixture(np.float64))
    x, score_fn = jnp.array([[0.4, -0.3], [-1.0, 0.9]]), ss.exact_score(gmm, sde)
    terminal = ss.marginal(gmm, sde, sde.t1).log_prob

    @jax.jit
    @jax.vmap
    def run(x):
        options = {"rtol": 1e-9, "atol": 1e-9, "terminal_log_prob": terminal}
        ends = {"start": sde.t0, "stop": sde.t1}
        field = ss.probability_flow_field(score_fn, sde)
        probes = {"num_probes": 2, "probes": basis_probes}
        flow = ss.flow_log_prob(KEY(), field, x, **ends, **probes, **options)
        return flow.log_prob, ss.exact_log_likelihood(score_fn, sde, x, **options).log_prob

    flow, model = run(x)
    np.testing.assert_allclose(flow, model, atol=1e-7)  # the probes' spread counts as an error too
    np.testing.assert_allclose(
        flow, jax.vmap(ss.marginal(gmm, sde, sde.t0).log_prob)(x), atol=1e-6
    )


def moved(net, shape, scale=0.7):
    """Parameters with draws of their own in place of the zeros."""
    params = jax.jit(net.init)(KEY(), jnp.zeros(shape), 0.5)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    draw = lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype)  # noqa: E731
    return jax.tree.unflatten(structure, [draw(leaf) for leaf in leaves])


@pytest.mark.slow
def test_the_density_of_a_network_integrates_to_one():
    """By the midpoint rule on [−8, 8]², which has no error to speak of where all is smooth."""
    net = ConcatSquash(8, 2)
    middles = -8 + 0.2 * (np.arange(80) + 0.5)
    points = jnp.asarray(np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2), jnp.float32)
    field = Partial(net.apply, moved(net, (2,)))
    options = {"rtol": 1e-4, "atol": 1e-4}
    log_prob = jax.jit(jax.vmap(lambda x: ss.exact_flow_log_prob(field, x, **options).log_prob))(
        points
    )
    log_prob = np.asarray(log_prob, np.float64)
    integral = 0.2**2 * np.exp(log_prob).sum()
    normal = -0.5 * np.sum(np.asarray(points) ** 2, 1) - np.log(2 * np.pi)
    divergence = 0.2**2 * np.sum(np.exp(log_prob) * (log_prob - normal))
    print(f"integral {integral:.5f}; {divergence:.2f} nats from the normal")
    assert abs(integral - 1) < 0.01 and divergence > 0.3


def test_maximum_likelihood_trains_and_never_traces_again():
    """Each of six steps of Adam lowers the loss, which is free of noise: the same batch and probes
    for all.
    """
    net = ConcatSquash(8, 1)
    batch = ss.data.two_moons(KEY(), 64)
    params = jax.jit(net.init)(KEY(), batch[0], 0.0)
    optimizer, ts = optax.adam(3e-2), jnp.linspace(0.0, 1.0, 5)
    first, last = ts[0], ts[-1]

    def loss(params):
        # their values known, while the rest is traced
        options = {"solver": diffrax.Heun(), "ts": ts, "start": first, "stop": last}
        return ss.flow_loss(KEY(), Partial(net.apply, params), batch, **options)

    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(chex.assert_max_traces(step, n=1))
    state, values = optimizer.init(params), []
    for _ in range(6):
        params, state, value = step(params, state)
        values.append(float(value))
    chex.clear_trace_counter()
    assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.05
    normal = 0.5 * np.sum(np.asarray(batch) ** 2, 1) + np.log(2 * np.pi)
    np.testing.assert_allclose(values[0], normal.mean(), rtol=1e-6)  # it starts at the identity


@pytest.mark.parametrize("shape", [(2,), (2, 2, 1)])
def test_concat_squash_is_its_formula(shape):
    net, t = ConcatSquash(4, 2), 0.3
    x = np.linspace(-1.0, 1.0, np.prod(shape)).astype(np.float32).reshape(shape)
    params = moved(net, shape)
    h = x.reshape(-1)
    for i in range(3):
        layer, gate, shift = (params["params"][f"{n}_{i}"] for n in ("layer", "gate", "shift"))
        h = np.tanh(h) if i else h
        gates = 1 / (1 + np.exp(-(t * gate["kernel"][0] + gate["bias"])))
        h = (h @ layer["kernel"] + layer["bias"]) * gates + t * shift["kernel"][0]
    half = dataclasses.replace(net, dtype=jnp.bfloat16)
    full, half = (jax.jit(each.apply)(params, x, t) for each in (net, half))
    np.testing.assert_allclose(full, h.reshape(shape), rtol=1e-5)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.1 * np.abs(h).max())  # 8 bits, three layers


def fine(x, t):
    return -x


def call(x, t=0.5):
    return ConcatSquash(2, 1).init(KEY(), jnp.asarray(x), t)


BAD = {
    "a field of another shape": (
        lambda: ss.exact_flow_log_prob(lambda x, t: jnp.stack([x, x]), X),
        r"`field` must return the shape of `x`; got \(2, 2\) for x of shape \(2,\)",
    ),
    "a batched field": (
        lambda: ss.sample_flow(KEY(), lambda x, t: x[:, 0] * t, (2,)),
        "`field` failed on one example",
    ),
    "integers": (
        lambda: ss.flow_log_prob(KEY(), fine, jnp.arange(2)),
        "`x` must be floating point; got int32.*dequantise",
    ),
    "an integer batch": (
        lambda: ss.flow_loss(KEY(), fine, jnp.ones((3, 2), int)),
        "`batch` must be floating point",
    ),
    "no time": (
        lambda: ss.exact_flow_log_prob(fine, X, start=1.0),
        "`stop` must differ from `start`; got 1.0 for both",
    ),
    "no time for a sample": (
        lambda: ss.sample_flow(KEY(), fine, (2,), start=1.0),
        "`stop` must differ from `start`",
    ),
    "a grid the wrong way round": (
        lambda: ss.exact_flow_log_prob(fine, X, ts=jnp.array([1.0, 0.5, 0.0])),
        "`ts` must be a grid that runs from start=0.0 to stop=1.0",
    ),
    "a tolerance beyond float32": (
        lambda: ss.exact_flow_log_prob(fine, X, rtol=1e-9),
        "`rtol` must be at least 4.8e-07.*Raise it, or compute in float64",
    ),
    "a negative tolerance": (
        lambda: ss.exact_flow_log_prob(fine, X, atol=-1.0),
        "`atol` must be finite and above 0",
    ),
    "an initial state of another shape": (
        lambda: ss.sample_flow(KEY(), fine, (2,), init=jnp.zeros(3)),
        r"`init` must have shape \(2,\); got \(3,\). It is x at `stop`",
    ),
    "a terminal density of a batch": (
        lambda: ss.exact_flow_log_prob(fine, X, terminal_log_prob=lambda x: x, rtol=1e-2),
        "`terminal_log_prob` must return a scalar",
    ),
    "a name for an adjoint": (
        lambda: ss.flow_loss(KEY(), fine, X[None], adjoint="backsolve"),
        "`adjoint` must be one of diffrax's adjoints.*got 'backsolve'",
    ),
    "backwards along a grid": (
        lambda: ss.exact_flow_log_prob(
            fine, X, ts=jnp.array([0.0, 1.0]), adjoint=diffrax.BacksolveAdjoint()
        ),
        "`adjoint` must not be BacksolveAdjoint on a grid `ts`.*RecursiveCheckpointAdjoint",
    ),
    "an integer example": (lambda: call([0, 1]), "`x` must be floating point; got int32"),
    "several times": (lambda: call([0.0, 1.0], jnp.ones(2)), r"`t` must have shape \(\)"),
    "no width": (lambda: ConcatSquash(0, 1), "`width`.*at least 1; got 0"),
    "no depth": (lambda: ConcatSquash(1, 0), "`depth`.*at least 1; got 0"),
}


@pytest.mark.parametrize(("attempt", "words"), BAD.values(), ids=BAD)
def test_bad_input(attempt, words):
    with pytest.raises(ArgumentError, match=words):
        attempt()


def test_too_few_steps_say_what_to_raise():
    """Forwards, and backwards where only the adjoint's own solve runs out."""
    with pytest.raises(RuntimeError, match="within max_steps=3: raise `max_steps`, loosen `rtol`"):
        ss.exact_flow_log_prob(fine, X, rtol=1e-6, atol=1e-6, max_steps=3)
    adjoint = diffrax.BacksolveAdjoint(max_steps=2)
    one = lambda x: jnp.sum(ss.integrate(fine, x, start=0.0, stop=1.0, adjoint=adjoint).x)  # noqa: E731
    with pytest.raises(RuntimeError, match="maximum number of solver steps was reached"):
        jax.grad(one)(X)
