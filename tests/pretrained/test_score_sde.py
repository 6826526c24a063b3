"""Published checkpoints of score SDE: against tensors of the published PyTorch definitions."""

import hashlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sde_score as ss
from sde_score.pretrained import score_sde
from sde_score.pretrained._torch_file import read_pth

DATA = Path(__file__).parents[1] / "data"
NAMES = ["vp_ddpmpp", "subvp_ddpm", "ve_ncsnpp", "ve_ncsnpp_skip"]
# These programs run for milliseconds and compile for seconds.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(checkpoint, **changes):
    return json.loads((DATA / f"{checkpoint}.json").read_text()) | changes


def published(name):
    """What `read_pth` returns of the checkpoint. One is here as published; of the others, to save
    space, the averages and frequencies, in the order of the checkpoint.
    """
    if (DATA / f"{name}.pth").exists():
        return read_pth(DATA / f"{name}.pth")
    arrays = load_file(DATA / f"{name}.safetensors")
    arrays = {key.split(" ")[1]: arrays[key] for key in sorted(arrays)}
    model = {f"module.{key}": array + 1.0 for key, array in arrays.items()}
    frequencies = {key: array for key, array in arrays.items() if key == "all_modules.0.W"}
    model |= {f"module.{key}": array for key, array in frequencies.items()}
    averages = [array for key, array in arrays.items() if key not in frequencies]
    return {"model": {"module.sigmas": np.ones(3)} | model, "ema": {"shadow_params": averages}}


@pytest.fixture
def load(monkeypatch):
    """`score_sde.load` of what `edit` makes of a stored checkpoint."""

    def load(checkpoint, edit=lambda file: file, dtype=None, **changes):
        read = lambda path, sha256: edit(published(checkpoint))
        monkeypatch.setattr(score_sde, "read_pth", read)
        return score_sde.load(f"{checkpoint}.pth", config(checkpoint, **changes), dtype=dtype)

    return load


def reference(name):
    """Tensors by name, images (H, W, C)."""
    tensors = load_file(DATA / f"{name}.reference.safetensors")
    return {
        key.removeprefix("ref."): jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim == 4 else x)
        for key, x in tensors.items()
    }


def evaluate(score_fn, sde, ref):
    """The score and, by one derivative along the probe, the divergence of the flow's drift."""

    def one(x, t, probe):
        score, pushed = jax.jvp(lambda x: score_fn(x, t), (x,), (probe,))
        along = sde.drift(probe, t) - 0.5 * sde.diffusion(t) ** 2 * pushed  # the drift is linear
        return score, jnp.sum(probe * along)

    return jax.vmap(one)(ref["x"], ref["t"], ref["probe"])


def close(got, want, tolerance):
    """Within `tolerance` of the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.max(np.abs(want)))


@pytest.mark.parametrize("name", NAMES)
def test_reference(name, load):
    """Float32 in another order of summation, through some twenty layers: 5e-6 was seen."""
    model, ref = load(name), reference(name)
    score, div = jit(evaluate)(model.score_fn, model.sde, ref)
    close(score, ref["score"], 1e-4)
    np.testing.assert_allclose(div, ref["pf_div"], rtol=1e-3)
    assert model.data_range == ((0.0, 1.0) if name.startswith("ve") else (-1.0, 1.0))
    assert (model.sde.t0, model.sde.t1) == (1e-5, 1.0)


def test_a_published_file(load):
    """As it is, by its checksum; the network as published; the averages, not the last weights."""
    name = "vp_ddpmpp"
    digest = hashlib.sha256((DATA / f"{name}.pth").read_bytes()).hexdigest()
    model = score_sde.load(DATA / f"{name}.pth", config(name), sha256=digest)
    ref = reference(name)
    outputs = jit(lambda net_fn, x, labels: jax.vmap(net_fn)(x, labels))
    close(outputs(model.net_fn, ref["x"], ref["labels"]), ref["net_out"], 1e-4)
    with pytest.raises(ValueError, match="SHA-256 0000"):
        score_sde.load(DATA / f"{name}.pth", config(name), sha256="0" * 64)
    raw = load(name, lambda file: file | {"ema": {"shadow_params": trainable(file)}})
    far = outputs(raw.net_fn, ref["x"], ref["labels"])
    assert np.max(np.abs(far - ref["net_out"])) > 0.1 * np.max(np.abs(ref["net_out"]))


def trainable(file):
    return [array for key, array in file["model"].items() if key != "module.sigmas"]


@pytest.mark.parametrize(
    "name", [NAMES[1]] + [pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != NAMES[1]]
)
def test_half_precision(name, load):
    """8 bits in each of some thirty roundings: 2 % of the largest score; -rP shows how much."""
    model, ref = load(name, dtype=jnp.bfloat16), reference(name)
    score = jit(lambda s, x, t: jax.vmap(s)(x, t))(model.score_fn, ref["x"], ref["t"])
    off = np.max(np.abs(score - ref["score"])) / np.max(np.abs(ref["score"]))
    print(f"bfloat16 within {100 * off:.2f} % of the largest score")
    close(score, ref["score"], 0.02)
    assert score.dtype == jnp.float32 and not np.allclose(score, ref["score"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bits_per_dim(name, load):
    """As published: one probe, from 1e-5 to 1 at tolerances of 1e-5, to 0.01 bits/dim.

    The published steps are one for both images, ours each image's own: both are off by some
    thousandths, as smaller tolerances show.
    """
    model, ref = load(name), reference(name)

    def log_prob(score_fn, x, probe):
        probes = lambda key, num, shape: jnp.broadcast_to(probe, (num, *shape))
        options = {"probes": probes, "rtol": 1e-5, "atol": 1e-5}
        return ss.log_likelihood(jax.random.key(0), score_fn, model.sde, x, **options).log_prob

    nats = jax.jit(jax.vmap(log_prob, (None, 0, 0)))(model.score_fn, ref["data"], ref["probe"])
    bits = ss.bits_per_dim(nats, 768, num_levels=256, data_range=model.data_range)
    np.testing.assert_allclose(bits, ref["bits_per_dim"], atol=0.01)


def fake(config, x=1.0):
    """The labels and the score that a network which returns its time input would have."""
    sde = score_sde._sde(config)
    net_fn = lambda x, time_input: x * time_input
    return sde, score_sde._score_fn(config, sde, net_fn)


def test_models_of_discrete_times():
    """Labels and deviations of the published steps, and division by the sigma of a level."""
    t, x = 0.3, jnp.ones(())
    sde, score = fake(config("vp_ddpmpp", continuous=False, num_scales=500))
    betas = np.linspace(0.1, 20.0, 500) / 500
    std = np.sqrt(1.0 - np.prod(1.0 - betas[: int(t * 499) + 1]))
    np.testing.assert_allclose(score(x, t), -t * 499 / std, rtol=1e-6)
    assert abs(std / sde.sigma(t) - 1.0) < 0.01  # the same process
    np.testing.assert_allclose(sde.sigma(sde.t0) ** 2, betas[0], rtol=1e-5)  # the first step
    without = {k: v for k, v in config("vp_ddpmpp").items() if k != "continuous"}
    with pytest.raises(
        ValueError, match="must have the field 'continuous'|flat dictionary.*'cont"
    ):
        score_sde.load("none.pth", without)
    levels = config("ve_ncsnpp", continuous=False, num_scales=500, embedding_type="positional")
    sde, score = fake(levels)
    assert score(x, t) == round(0.7 * 499)
    net = score_sde._network(levels, None)
    net_fn = score_sde._net_fn(levels, net, ss._typing.bind(lambda x, index: x))
    assert not net.scale_by_sigma
    # the first level has the most noise; the 349th of 499 steps down is that of t = 0.3
    np.testing.assert_allclose(net_fn(x, 0), 1 / 50.0, rtol=1e-5)
    np.testing.assert_allclose(net_fn(x, 349), 1.0 / sde.sigma(1 - 349 / 499), rtol=1e-5)


SKIPS = {"progressive_input": "input_skip", "progressive_combine": "cat"}
DDPM = {"resblock_type": "ddpm"}
FAMILY = {
    "residual": {"progressive": "residual", "progressive_input": "residual", "fir": False},
    "DDPM's blocks": {"progressive": "residual"} | DDPM,
    "skips": SKIPS | DDPM | {"resamp_with_conv": False},
    "deep": {"ch_mult": [1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [16, 4]} | DDPM,
}


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)
def test_every_architecture_of_the_family_is_laid_out(changes):
    """Each of our parameters has one place in the file, of as many numbers."""
    net = score_sde._network(config("ve_ncsnpp", **changes), None)
    layout = score_sde._layout(net, 16)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((16, 16, 3)), 1.0)
    paths = {entry.path: entry for entry in layout.values()}
    assert len(paths) == len(layout)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        entry = paths[tuple(key.key for key in path)]
        there = np.arange(leaf.size).reshape(entry.shape)
        assert entry.convert(there).shape == leaf.shape


def drop(key):
    return lambda file: file | {"model": {k: v for k, v in file["model"].items() if k != key}}


REFUSED = {
    "width": ({"nf": 24}, r"differ:\n.*0.W: shape \(16,\) instead of \(24,\)"),
    "depth": ({"num_res_blocks": 2}, r"differ:\n.*missing, of shape \("),
    "vast depth": ({"num_res_blocks": 10**6}, "arrays for 2000000 blocks"),
    "image size": ({"image_size": 15}, "`x` must be one image.*multiples of 2; got shape .15, 15"),
    "field": ({"nf": 0}, "`width` must be a Python integer of at least 4; got 0"),
    "model": ({"name": "ncsnv2"}, "`config.'name'.` must be one of .*got 'ncsnv2'"),
    "activation": ({"nonlinearity": "gelu"}, "`config.'nonlinearity'.` must be one of"),
    "no time": ({"conditional": False}, "`config.'conditional'.` must be one of .*got False"),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED)
def test_another_configuration_is_refused(changes, match, load):
    with pytest.raises(ValueError, match=match):
        load("ve_ncsnpp", **changes)


def test_damaged_files_are_refused(load):
    with pytest.raises(ValueError, match="1 differ:\n  all_modules.3.bias: missing, of shape"):
        load("ve_ncsnpp", drop("module.all_modules.3.bias"))
    with pytest.raises(
        ValueError, match="must hold 'model' and 'ema' with 'shadow_params'; 'ema'"
    ):
        load("ve_ncsnpp", lambda file: {"model": file["model"]})
    fewer = lambda file: file | {"ema": {"shadow_params": file["ema"]["shadow_params"][1:]}}
    with pytest.raises(ValueError, match="an average of each of its .* trainable parameters; got"):
        load("ve_ncsnpp", fewer)
    turned = lambda file: file | {"ema": {"shadow_params": file["ema"]["shadow_params"][::-1]}}
    with pytest.raises(ValueError, match="differ:\n.*instead of"):
        load("ve_ncsnpp", turned)
    text = lambda file: file | {"ema": {"shadow_params": ["a"] * 156}}
    with pytest.raises(ValueError, match="differ:\n.*str instead of an array"):
        load("ve_ncsnpp", text)
    with pytest.raises(ValueError, match="must hold arrays by their names; got list"):
        load("ve_ncsnpp", lambda file: file | {"model": [1]})


def changed(**changes):
    return config("ve_ncsnpp", **changes)


MALFORMED = {
    "a list": ([1, 2], "`config` must be one flat dictionary.*got list"),
    "a path": ("ve_ncsnpp.json", "got str"),
    "nothing": (None, "got NoneType"),
    "in parts": ({"model": changed(), "data": {}}, r"\['model', 'data'\].*parts model, data and"),
    "a field missing": ({"conditional": True, "image_size": 8, "ch_mult": []}, "no field 'nf'"),
    "no embedding": (
        changed(embedding_type=None),
        "`config` must be one flat dictionary.*AttributeError",
    ),
    "two SDEs": (changed(sde=["vesde"]), "`config` must be one flat dictionary.*TypeError"),
    "a rate in words": (changed(dropout="0.1"), "`config` must be one flat dictionary.*TypeError"),
    "no noise": (
        config("vp_ddpmpp", beta_min=None),
        "`config` must be one flat dictionary.*TypeError",
    ),
    "widths in words": (changed(ch_mult="12"), "`multipliers.0.` must be a Python integer"),
    **{
        f"images of {size!r}": (changed(image_size=size), "config.'image_size'.` must be")
        for size in ("16", 0, 16.0, None)
    },
}


@pytest.mark.parametrize(("malformed", "match"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_configurations_are_refused(malformed, match):
    with pytest.raises(ss._checks.ArgumentError, match=match):
        score_sde.load("absent.pth", malformed)
