"""The U-Net: resampling against its definition, parameters as published, symmetry, context."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate, upfirdn

import sde_score as ss
from sde_score.nets import Context, UNet, presets
from sde_score.nets.blocks import AttentionBlock, Resample
from sde_score.nets.resample import blur, downsample, upsample

# These programs run for milliseconds and compile for seconds.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SUBVP = {"embedding": "positional", "scale_by_sigma": False, "recentre": False}
COUNTS = {  # trainable parameters, counted from the published definitions
    "DDPM": (presets.ddpm, {}, 35_218_947, 0),
    "DDPM++": (presets.ddpmpp, {}, 61_804_419, 0),
    "NCSN++ VE": (presets.ncsnpp, {}, 62_758_787, 128),
    "NCSN++ sub-VP": (presets.ncsnpp, SUBVP, 62_693_251, 0),
    "NCSN++ 64": (presets.ncsnpp, SUBVP | {"attention_levels": (2,)}, 62_693_251, 0),
    "NCSN++ 256": (presets.ncsnpp_256, {}, 65_574_421, 128),
}
DEEP = {
    "DDPM++ deep": (presets.ddpmpp, {"num_blocks": 8}, 106_632_579, 0),
    "NCSN++ VE deep": (presets.ncsnpp, {"num_blocks": 8}, 107_586_947, 128),
}
TINY = {"width": 8, "multipliers": (1, 2), "num_blocks": 1, "init_scale": 1.0}
FIR = {"fir_kernel": (1.0, 3.0, 3.0, 1.0)}
NETS = {
    "residual": TINY
    | FIR
    | {"embedding": "fourier", "scale_by_sigma": True, "recentre": True}
    | {"progressive_input": "residual", "progressive_output": "residual"},
    "ddpm": TINY
    | {"biggan": False, "skip_rescale": False, "groups": 4, "attention_head_dim": 4}
    | {"attention_after_every_block": True, "symmetric_padding": True},
}


def shapes(net, shape=(8, 12, 3), context=None, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(net.init, jax.random.key(0), x, 0.7, context)


def random_like(tree, seed=0):
    """Arrays of order 1/√fan-in, about 1 for the norms' scales."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = 0.1 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(
            scale * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(draw, tree)


def image(shape=(8, 12, 3), seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("make", "options", "params", "constants"),
    [pytest.param(*row, id=name) for name, row in COUNTS.items()]
    + [pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in DEEP.items()],
)
def test_parameters_as_published(make, options, params, constants):
    net = make(**options)
    size = 2 ** (len(net.multipliers) - 1)  # the smallest image: their number depends on none
    variables = shapes(net, (size, size, 3))
    count = lambda name: sum(leaf.size for leaf in jax.tree.leaves(variables.get(name, {})))
    assert (count("params"), count("constants")) == (params, constants)


def filtered(x, kernel, low, high, up=1, down=1):
    """By scipy: zeros between pixels and around (`low`, `high`), the kernel, every `down`-th."""
    kernel = np.asarray(kernel) * up / np.sum(kernel)
    for axis in (0, 1):
        padding = [(0, 0)] * 3
        spread = upfirdn([1.0], x, up, axis=axis)
        padding[axis] = (low, high + up * x.shape[axis] - spread.shape[axis])
        full = upfirdn(kernel, np.pad(spread, padding), axis=axis)
        valid = np.arange(len(kernel) - 1, full.shape[axis] - len(kernel) + 1, down)
        x = np.take(full, valid, axis=axis)
    return x


@pytest.mark.parametrize(
    "kernel", [(1.0, 3.0, 3.0, 1.0), (1.0, 2.0, 4.0, 7.0), (1.0, 1.0)], ids=str
)
def test_fir_filters(kernel):
    """Against their definition, an asymmetric kernel too; what is constant stays so inside."""
    x, ones = image((4, 6, 2)), jnp.ones((8, 8, 1))
    excess = len(kernel) - 2
    low, high = (excess + 1) // 2, excess // 2

    @jit
    def all_of_them(x, ones):
        wide = upsample(x, kernel, margin=1), blur(x, kernel, margin=1)
        plain = upsample(x), downsample(x)
        return upsample(x, kernel), downsample(x, kernel), wide, plain, downsample(ones, kernel)

    up, down, wide, plain, constant = all_of_them(x, ones)
    np.testing.assert_allclose(up, filtered(x, kernel, low + 1, high, up=2), atol=1e-6)
    np.testing.assert_allclose(down, filtered(x, kernel, low, high, down=2), atol=1e-6)
    np.testing.assert_allclose(constant[1:-1, 1:-1], 1.0, atol=1e-6)
    np.testing.assert_allclose(wide[0][1:-1, 1:-1], up, atol=1e-6)
    np.testing.assert_allclose(wide[1][1:-1:2, 1:-1:2], down, atol=1e-6)
    if len(kernel) == 2:  # neighbours and averages
        np.testing.assert_allclose(up, plain[0], atol=1e-6)
        np.testing.assert_allclose(down, plain[1], atol=1e-6)


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_convolution_with_fir_as_published(up):
    """Up: zeros between pixels, convolution, filter, padded once; down: filter, convolution."""
    kernel = FIR["fir_kernel"]
    module = Resample(UNet(**TINY)._layers(), up, 1, kernel, False)
    x, w = image((4, 6, 1)), image((3, 3), 2)
    params = {"conv": {"kernel": w[..., None, None], "bias": jnp.full(1, 0.3)}}
    got = module.apply({"params": params}, x)[..., 0]
    if up:
        spread = np.zeros((7, 11))
        spread[::2, ::2] = x[..., 0]
        full = correlate(np.pad(spread, 2), w, mode="valid")  # 9 × 13
        want = 4.0 * filtered(full[..., None], kernel, 1, 1)[..., 0]
    else:
        want = correlate(filtered(x, kernel, 2, 2)[..., 0], w, mode="valid")[::2, ::2]
    np.testing.assert_allclose(got, want + 0.3, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "ddpm"])
def test_a_transposed_image(name):
    """With every kernel transposed the output is, on an image that is not square."""
    net, x = UNet(**NETS[name]), image()
    variables = random_like(shapes(net))
    turned = jax.tree.map(lambda w: jnp.swapaxes(w, 0, 1) if w.ndim == 4 else w, variables)
    apply = jit(net.apply)
    out, other = apply(variables, x, 0.7), apply(turned, jnp.swapaxes(x, 0, 1), 0.7)
    assert out.shape == x.shape and np.std(out) > 0.1
    np.testing.assert_allclose(jnp.swapaxes(other, 0, 1), out, atol=1e-4)  # float32, 10 layers
    assert not np.allclose(apply(turned, x, 0.7), out, atol=1e-2)


def test_attention_in_heads():
    """softmax(q·k/√4) v in two heads of four channels, over all pixels."""
    block = AttentionBlock(UNet(**TINY)._layers(), 4)
    x = image((2, 3, 8))
    params = random_like(jax.eval_shape(block.init, jax.random.key(0), x))
    p = jax.tree.map(np.asarray, params)["params"]
    groups = np.asarray(x).reshape(6, 2, 4)
    centred = groups - groups.mean((0, 2), keepdims=True)
    normed = (centred / np.sqrt(centred.var((0, 2), keepdims=True) + 1e-6)).reshape(6, 8)
    h = normed * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = (
        (h @ p[n]["kernel"] + p[n]["bias"]).reshape(6, 2, 4) for n in ("query", "key", "value")
    )
    weights = np.exp(np.einsum("ihc,jhc->hij", q, k) / 2.0)
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hij,jhc->ihc", weights, v).reshape(6, 8)
    want = (x + (mixed @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)) / np.sqrt(2.0)
    np.testing.assert_allclose(block.apply(params, x), want, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "backend", "want"),
    [
        ("bfloat16", 8, "gpu", "cudnn"),
        ("float16", 16, "gpu", "cudnn"),
        ("bfloat16", 8, "cpu", None),
        (None, 8, "gpu", None),
        ("bfloat16", 4, "gpu", None),
    ],
)
def test_the_fused_kernel_is_taken_where_it_can_be(dtype, head_dim, backend, want, monkeypatch):
    """Only where asked for, and cuDNN has it."""
    taken, attention = [], jax.nn.dot_product_attention

    def recorded(*args, implementation):
        taken.append(implementation)
        return attention(*args)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for fused in (False, True):
        options = {"attention_head_dim": head_dim, "dtype": dtype, "fused_attention": fused}
        shapes(UNet(**SMALL | {"width": 16}, **options), (2, 2, 3))
    assert taken == [None, want]  # that in the middle


SMALL = {
    "width": 8,
    "multipliers": (1,),
    "num_blocks": 1,
    "attention_levels": (),
    "init_scale": 1.0,
}


def conditional(remat):
    """A loss of parameters and context over VE, through a network with all that a context has."""
    net = UNet(**SMALL, num_classes=4, dropout=0.5, embedding="fourier", remat=remat)
    variables = random_like(shapes(net, (4, 4, 3), Context(label=jnp.asarray(0))))
    constants = {"constants": variables["constants"]}
    x0 = jnp.stack([image((4, 4, 3), seed) for seed in (3, 4)])

    def loss(params, context):
        def score(x, t, context):
            return net.apply({"params": params, **constants}, x, 1.0 + t, context)

        return ss.dsm_loss(jax.random.key(1), score, ss.VE(sigma_max=2.0), x0, context=context)

    return variables["params"], loss


def test_context_and_remat():
    """Dropout goes by the key, labels choose rows; remat is there and changes no value."""
    params, loss = conditional(remat=False)
    remat_loss = conditional(remat=True)[1]
    value, labels = jit(loss), jnp.asarray([1, 3])
    # threefry's five masks would take half of the compilation
    draw = lambda seed: jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), 2)
    base = value(params, Context(draw(2), labels))
    assert value(params, Context(draw(3), labels)) != base
    assert value(params, Context(draw(2), labels[::-1])) != base
    for row in range(4):
        embedding = params["label"]["embedding"].at[row].add(1.0)
        moved = value(params | {"label": {"embedding": embedding}}, Context(draw(2), labels))
        assert (moved != base) == (row in (1, 3))
    np.testing.assert_allclose(
        jit(remat_loss)(params, Context(draw(2), labels)), base, rtol=1e-5
    )  # float32
    program = str(jax.make_jaxpr(remat_loss)(params, Context(draw(2), labels)))
    assert len(re.findall(r"= (remat\w*|checkpoint)\[", program)) == 5  # a block each


def test_dropout_needs_a_key():
    """Without one it is not in the program; the key may be the context, as in `MLP`; each of the
    five blocks draws for itself.
    """
    x, net = image((4, 4, 3)), UNet(**SMALL, dropout=0.5)
    variables = random_like(shapes(net, x.shape))
    program = lambda net, *context: str(jax.make_jaxpr(net.apply)(variables, x, 0.7, *context))
    assert program(net) == program(UNet(**SMALL)) == program(net, Context())
    keyed = program(net, jax.random.key(0))
    assert keyed == program(net, Context(dropout_key=jax.random.key(0)))
    folded = re.findall(r"random_fold_in \w+ (\w+)", keyed)
    assert len(folded) == len(set(folded)) == 5


def test_the_frequencies_are_constants_of_width_16():
    net = UNet(**SMALL | {"width": 64}, embedding="fourier")
    init = jit(lambda key: net.init(key, image((2, 2, 3)), 0.7)["constants"])
    frequencies = init(jax.random.key(0))["frequencies"]
    assert frequencies.shape == (64,)
    # the standard error of a standard deviation is 16/√128
    assert abs(np.std(frequencies) - 16.0) < 5 * 16.0 / np.sqrt(128)


@pytest.mark.parametrize(("width", "shift", "cosine_first"), [(6, 1.0, False), (7, 0.0, True)])
def test_positional_embedding(width, shift, cosine_first):
    net = UNet(width=width, embedding_shift=shift, cosine_first=cosine_first)
    angles = 250.0 * np.exp(-np.log(10_000.0) * np.arange(3) / (3 - shift))
    parts = [np.sin(angles), np.cos(angles)][:: -1 if cosine_first else 1]
    want = np.concatenate([*parts, np.zeros(width % 2)])
    np.testing.assert_allclose(net._positional(jnp.float32(250.0)), want, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "bfloat16"), ("float64", None), ("bfloat16", None)]
)
def test_precisions(dtype, compute, x64):
    """The output is in the dtype of x, whatever it was computed in; parameters are float32."""
    x = jax.ShapeDtypeStruct((4, 4, 3), dtype)
    net = UNet(**SMALL, embedding="fourier", scale_by_sigma=True, dtype=compute)
    variables = shapes(net, x.shape, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {np.dtype("float32")}
    assert jax.eval_shape(net.apply, variables, x, 0.7).dtype == x.dtype


def call(shape=(8, 8, 3), t=0.7, context=None, dtype=jnp.float32, **options):
    return UNet(**TINY | options).init(jax.random.key(0), jnp.zeros(shape, dtype), t, context)


BAD = {
    "size": (lambda: call((8, 7, 3)), r"`x` must be one image.*multiples of 2; got shape \(8, 7"),
    "batch": (lambda: call((5, 8, 8, 3)), "`x` must be one image.*For a batch, jax.vmap"),
    "no rows": (lambda: call((0, 8, 3)), r"`x` must be one image.*positive multiples of 2; got"),
    "channels": (lambda: call((4, 8, 8)), r"`x` must have 3 channels.*\(4, 8, 8\).*moveaxis"),
    "integers": (lambda: call(dtype=int), "`x` must be floating point; got int32"),
    "times": (lambda: call(t=jnp.ones(2)), r"`time_input` must have shape \(\); got \(2,\)"),
    "raw key": (lambda: call(context=jax.random.PRNGKey(0)), "`dropout_key` must be a typed key"),
    "no label": (lambda: call(num_classes=3), "`context.label` must be given exactly where"),
    "needless label": (lambda: call(context=Context(label=1)), "exactly where.*num_classes=None"),
    **{
        f"label {label}": (
            lambda label=label: call(context=Context(label=label), num_classes=3),
            "`context.label` must be an integer from 0 to 2; got",
        )
        for label in (3, -1, 1.0)
    },
    "labels": (
        lambda: call(context=Context(label=np.arange(2)), num_classes=3),
        r"`context.label` must have shape \(\); got \(2,\)",
    ),
    "embedding": (lambda: UNet(embedding="sine"), "`embedding` must be one of.*got 'sine'"),
    "sigma": (lambda: UNet(scale_by_sigma=True), "`scale_by_sigma` must be False with a posit"),
    "dropout": (lambda: UNet(dropout=1.0), "`dropout` must be at least 0 and below 1; got 1.0"),
    "level": (lambda: UNet(attention_levels=(4,)), r"`attention_levels` must be.*0 to 3; got \(4"),
    "heads": (lambda: call(attention_head_dim=3), "`attention_head_dim` must divide.*got 3 with"),
    "groups that divide not": (
        lambda: call(groups=3),
        "`groups` must divide the channels; got 3 with 8 channels",
    ),
    **{
        name: (lambda name=name: UNet(**{name: 0}), f"`{name}`.*at least 1; got 0")
        for name in ("groups", "attention_head_dim", "num_classes")
    },
    "taps": (lambda: UNet(fir_kernel=()), r"`len\(fir_kernel\)`.*at least 1; got 0"),
    "width": (lambda: UNet(width=0), "`width`.*at least 4; got 0"),
    "multiplier": (lambda: UNet(multipliers=(1, 0)), r"`multipliers\[1\]`.*at least 1; got 0"),
    "blocks": (lambda: UNet(num_blocks=0), "`num_blocks`.*at least 1; got 0"),
}


@pytest.mark.parametrize(("attempt", "match"), BAD.values(), ids=BAD)
def test_bad_input(attempt, match):
    with pytest.raises(ValueError, match=match):
        attempt()
