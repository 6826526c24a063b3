"""The MLP, and networks of three frameworks through the same training step."""

import re
from pathlib import Path

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_sde import within

import sde_score
from sde_score import VP, dsm_loss, init_train_state, make_train_step, score_from_noise
from sde_score.nets import MLP, fourier_embedding, geometric_frequencies

README = Path(__file__).parents[1] / "README.md"
SHAPES = {"vector": (2,), "image": (8, 8, 1)}


def make(net, shape, shift=0.1):
    """Parameters moved off the zeros that the output starts with."""
    x = jnp.asarray(np.linspace(-1.0, 1.0, np.prod(shape)).reshape(shape), jnp.float32)
    params = jax.jit(net.init)(jax.random.key(0), x, 0.5)
    rng = np.random.default_rng(0)
    shifted = lambda p: np.asarray(p) + np.float32(shift) * rng.normal(size=p.shape)  # noqa: E731
    return x, params, jax.tree.map(lambda p: jnp.asarray(shifted(p), jnp.float32), params)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlp_on_any_event(shape):
    """It starts at zero, depends on t and x once its parameters move, and has the parameters that
    its definition says.
    """
    width, depth, d = 16, 2, int(np.prod(shape))
    net = MLP(width, depth)
    x, params, moved = make(net, shape)
    apply = jax.jit(net.apply)
    assert apply(params, x, 0.5).shape == shape and apply(params, x, 0.5).dtype == jnp.float32
    np.testing.assert_array_equal(apply(params, x, 0.5), 0.0)
    out = apply(moved, x, 0.5)
    assert np.all(out != apply(moved, x, 0.4)) and np.all(out != apply(moved, x + 1.0, 0.5))
    # embedding of 2·16 features; input; three Dense layers of each block; output
    dense = lambda n, m: n * m + m  # noqa: E731
    want = dense(32, width) + dense(d, width) + 3 * depth * dense(width, width) + dense(width, d)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == want


def test_mlp_in_half_precision_keeps_float32_parameters():
    net = MLP(16, 1, dtype=jnp.bfloat16)
    x, params, moved = make(net, (2,))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out, exact = (jax.jit(net.apply)(moved, x, 0.5) for net in (net, MLP(16, 1)))
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out, exact, atol=0.05 * np.max(np.abs(exact)))  # 8 bits, 4 layers
    assert not np.array_equal(out, exact)


def test_mlp_grows_linearly():
    """Far from the data f(2x)/f(x) → 2: swish is linear out there, and the stream is linear in
    x.
    """
    x, _, moved = make(MLP(16, 2), (2,))
    apply = jax.jit(MLP(16, 2).apply)
    far, twice = (apply(moved, scale * x, 0.5) for scale in (1e4, 2e4))
    np.testing.assert_allclose(twice / far, 2.0, rtol=1e-3)  # corrections of order 1/|x|


def test_dropout():
    """Only with a key, reproducible, and unbiased in a single block (whose output is linear in
    what is dropped).
    """
    net = MLP(8, 1, dropout=0.3)
    x, _, moved = make(net, (2,))
    apply = jax.jit(net.apply)
    silent = apply(moved, x, 0.5)
    np.testing.assert_array_equal(silent, jax.jit(MLP(8, 1).apply)(moved, x, 0.5))
    keys = jax.random.split(jax.random.key(2), 4_000)
    draw = jax.jit(jax.vmap(lambda key: net.apply(moved, x, 0.5, key)))
    outputs = np.asarray(draw(keys))
    within(outputs, np.asarray(silent, np.float64))
    assert len(np.unique(outputs[:, 0])) > 100  # of 2^8 masks
    again = draw(jax.random.split(jax.random.key(2), 4_000))
    np.testing.assert_array_equal(again, outputs)
    # a rate of zero ignores the key
    plain = jax.jit(MLP(8, 1).apply)(moved, x, 0.5, jax.random.key(3))
    np.testing.assert_allclose(plain, silent, rtol=1e-5)


def test_embedding():
    frequencies = geometric_frequencies(4, 0.5, 4.0)
    np.testing.assert_allclose(frequencies, [0.5, 1.0, 2.0, 4.0], rtol=1e-6)
    # sines, then cosines, of 2π f v
    want = [np.sin(0.25 * np.pi), 1.0, 0.0, 0.0, np.cos(0.25 * np.pi), 0.0, -1.0, 1.0]
    np.testing.assert_allclose(fourier_embedding(0.25, frequencies), want, atol=1e-6)


def linen_model():
    net = MLP(16, 1)
    return jax.jit(net.init)(jax.random.key(3), jnp.zeros(2), 0.5), net.apply


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.last = nnx.Linear(16, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs, deterministic=True)  # its key is no parameter

    def __call__(self, x, t):
        return self.last(self.dropout(nnx.swish(self.first(jnp.append(x, t)))))


def documented(words, model):
    """The README's three lines on a model: its parameters and its pure function."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope = {"nnx": nnx, "eqx": eqx, "ss": sde_score, "sde": VP(), "model": model}
    scope["Partial"] = jax.tree_util.Partial
    exec(next(block for block in blocks if words in block), scope)  # noqa: S102
    assert scope["score"](scope["params"])(jnp.ones(2), 0.5).shape == (2,)
    return scope["params"], scope["net_fn"]


def nnx_model():
    return documented("nnx.split", NNXModel(nnx.Rngs(0)))


class EquinoxModel(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, x, t):
        return self.net(jnp.append(x, t))


def equinox_model():
    net = eqx.nn.MLP(3, 2, 16, 1, jax.nn.swish, key=jax.random.key(3))
    return documented("eqx.partition", EquinoxModel(net))


FRAMEWORKS = {"linen": linen_model, "nnx": nnx_model, "equinox": equinox_model}


@pytest.mark.parametrize("build", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_every_framework_trains(build):
    """Two steps of one compiled program move every parameter that has a gradient, downhill."""
    chex.clear_trace_counter()
    sde, (params, apply) = VP(), build()

    def loss(params, key, x0):
        noise = jax.tree_util.Partial(apply, params)
        return dsm_loss(key, score_from_noise(sde, noise), sde, x0)

    optimizer = optax.adam(1e-2)
    step = jax.jit(chex.assert_max_traces(n=1)(make_train_step(loss, optimizer)))
    x0 = jax.random.normal(jax.random.key(4), (64, 2)) + 2.0
    state = init_train_state(params, optimizer)
    losses = []
    for _ in range(3):  # the same noise each time, so the losses compare
        state, metrics = step(state, jax.random.key(5), x0)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert int(state.step) == 3 and float(metrics["grad_norm"]) > 0
    moved = jax.tree.map(lambda p, q: bool(jnp.any(p != q)), params, state.params)
    assert all(jax.tree.leaves(moved))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, state.params)


def test_a_batched_linen_network_is_wrapped_as_the_message_says():
    class Batched(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return nn.Dense(2)(jnp.concatenate([x, t[:, None]], axis=1))

    net = Batched()
    params = net.init(jax.random.key(6), jnp.zeros((1, 2)), jnp.zeros(1))
    bare = lambda x, t: net.apply(params, x, t)  # noqa: E731
    wrapped = lambda x, t: bare(x[None], t[None])[0]  # noqa: E731
    x0 = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="`score_fn` failed on one example"):
        dsm_loss(jax.random.key(7), bare, VP(), x0)
    assert np.isfinite(dsm_loss(jax.random.key(7), wrapped, VP(), x0))


def call(x=(0.0, 0.0), t=0.5, key=None, **options):
    net = MLP(**{"width": 4, "depth": 1, **options})
    return net.init(jax.random.key(0), jnp.asarray(x), t, key)


BAD = {
    "integers": (lambda: call(x=[0, 1]), "`x` must be floating point; got int32"),
    "times": (lambda: call(t=jnp.ones(2)), r"`t` must have shape \(\); got \(2,\)"),
    "raw key": (lambda: call(key=jax.random.PRNGKey(0)), "`dropout_key` must be a typed key"),
    "flag": (lambda: call(key=True), "`dropout_key` must be a typed key; got True"),
    "dropout": (lambda: MLP(dropout=1.0), "`dropout` must be at least 0 and below 1; got 1.0"),
    "width": (lambda: MLP(width=0), "`width`.*at least 1; got 0"),
    "depth": (lambda: MLP(depth=0), "`depth`.*at least 1; got 0"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
