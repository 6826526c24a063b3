"""Folders of diffusers against outputs of diffusers itself; our own file; the command."""

import hashlib
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_references import DATA, DDPM, EPSILON, VE, WHOLE, evaluate, weights
from jax.tree_util import Partial
from safetensors.numpy import load_file, save_file
from test_torch_file import archive, tensor, text

import sde_score as ss
from sde_score.pretrained import diffusers, export, score_sde
from sde_score.pretrained.__main__ import main
from sde_score.pretrained.export import load_pretrained, save_pretrained

DESCRIBED = json.loads((DATA / "diffusers.json").read_text())
REFERENCES = load_file(DATA / "diffusers.safetensors")
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_bin(path, arrays):
    """As torch.save writes a state_dict: each tensor on a storage of its own."""
    program, members = b"\x80\x02}(", []
    for i, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // 4 for stride in array.strides)
        program += text(name) + tensor(array.size, 0, array.shape, strides, key=f"{i}")
        members.append((f"data/{i}", array.tobytes()))
    path.write_bytes(archive(program + b"u.", members))


def write(folder, config, scheduler, arrays, *, pipeline=False, write=save_file):
    """A model's folder, or a pipeline's."""
    home = folder / "unet" if pipeline else folder
    beside = folder / "scheduler" if pipeline else folder
    home.mkdir(parents=True, exist_ok=True)
    beside.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps(config))
    (beside / "scheduler_config.json").write_text(json.dumps(scheduler))
    suffix = "safetensors" if write is save_file else "bin"
    write(arrays, home / f"diffusion_pytorch_model.{suffix}")
    return folder


def stored(kind, folder, **options):
    described = DESCRIBED[kind]
    arrays = weights(described["shapes"])
    return write(folder, described["config"], described["scheduler"], arrays, **options)


def batch(kind):
    """x as (N, H, W, C), times, and the output of diffusers in the same order."""
    x, times, out = (REFERENCES[f"{kind}.{name}"] for name in ("x", "times", "out"))
    return jnp.asarray(x.transpose(0, 2, 3, 1)), times, out.transpose(0, 2, 3, 1)


def assert_close(got, want):
    """Within 1e-4 of the largest value, as asked; 5e-6 is what float32 was seen to leave."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_ddpm_scores_are_those_of_diffusers(tmp_path):
    """In the old names of attention. At the time of a step's noise the score is −net/std there."""
    described = DESCRIBED["ddpm"]
    arrays = weights(described["shapes"])
    for new, old in OLD.items():
        arrays = {name.replace(f".{new}.", f".{old}."): a for name, a in arrays.items()}
    assert any(".proj_attn." in name for name in arrays)
    model = diffusers.load(write(tmp_path, described["config"], DDPM, arrays))
    x, steps, out = batch("ddpm")
    alphas = REFERENCES["alphas_cumprod"][steps.astype(int)]
    times = jnp.array([ss.time_of_log_snr(model.sde, np.log(a / (1 - a))) for a in alphas])
    scores = jax.jit(jax.vmap(model.score_fn))(x, times)
    assert_close(scores, -out / np.sqrt(1 - alphas)[:, None, None, None])
    assert model.data_range == (-1.0, 1.0) and (model.sde.beta_min, model.sde.t1) == (0.1, 1.0)
    first = float(model.sde.sigma(model.sde.t0)) ** 2
    assert first == pytest.approx(1e-4, rel=1e-4)  # beta_start; float32


def test_a_pipeline_with_heads_and_a_bin_file(tmp_path):
    """New names, several heads, cosines first, symmetric padding, in the form of torch.save."""
    write_file = lambda arrays, path: write_bin(path, arrays)
    model = diffusers.load(stored("modern", tmp_path, pipeline=True, write=write_file))
    x, steps, out = batch("modern")
    assert_close(jax.jit(jax.vmap(model.net_fn))(x, steps), out)


def test_ncsnpp_scores_are_those_of_diffusers(tmp_path):
    """The network is the score at sigma(t); the folder of the network finds its scheduler."""
    folder = stored("ncsnpp", tmp_path, pipeline=True)
    model = diffusers.load(folder / "unet")
    x, sigmas, out = batch("ncsnpp")
    assert model.sde == ss.VE(0.01, 348.0) and model.data_range == (0.0, 1.0)
    times = np.log(sigmas / 0.01) / np.log(348.0 / 0.01)
    assert_close(jax.jit(jax.vmap(model.score_fn))(x, jnp.asarray(times)), out)


CHANGES = {
    "another time shift": ({"resnet_time_scale_shift": "scale_shift"}, "must be 'default'; got"),
    "classes": ({"num_class_embeds": 10}, "`num_class_embeds` .* must be None; got 10"),
    "other blocks": (
        {"down_block_types": ["CrossAttnDownBlock2D"] * 3},
        "CrossAttn.*Compare",
    ),
    "attention on one way": ({"up_block_types": ["UpBlock2D"] * 3}, "`up_block_types` .* must be"),
    "odd widths": ({"block_out_channels": [32, 48, 64]}, "`block_out_channels` .* must be"),
    "no widths": ({"block_out_channels": []}, "`len.down_block_types.` .* must be 0; got 3"),
    "a width of zero": ({"block_out_channels": [0, 0, 0]}, "ZeroDivision"),
    "another scale": ({"mid_block_scale_factor": 2.0}, "`mid_block_scale_factor` .* must be 1.0"),
    "more outputs": ({"out_channels": 6}, "`out_channels` .* must be 3; got 6"),
    "another activation": ({"act_fn": "mish"}, "KeyError: 'mish'"),
    "too many blocks": ({"layers_per_block": 10**9}, "arrays for 3000000000 blocks"),
    "more blocks": ({"layers_per_block": 2}, "differ:\n.*missing, of shape"),
    "another class": ({"_class_name": "UNet2DConditionModel"}, "`_class_name` .* must be 'UNet2D"),
    "fewer blocks": (
        {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
        "`len.down_block_types.` .* must be 3; got 2",
    ),
    "recentred": ({"center_input_sample": True}, "`center_input_sample` .* must be False; got T"),
    "heads of nothing": ({"attention_head_dim": 0}, "`attention_head_dim` .* at least 1; got 0"),
    "groups": ({"norm_num_groups": 24}, "`groups` must divide the channels; got 24 with 32"),
    "a shift in words": ({"freq_shift": "one"}, "`folder` must hold .*TypeError"),
    "a vast width": ({"block_out_channels": [10**30] * 3}, "`folder` must hold .*|differ:"),
    "a vast number of levels": (
        {"block_out_channels": [32] * 10**4, "down_block_types": ["DownBlock2D"] * 10**4}
        | {"up_block_types": ["UpBlock2D"] * 10**4},
        "arrays for 10000 blocks",
    ),
    "no image": ({"sample_size": [16, 0]}, r"`shape` must be .*; got \(16, 0, 3\)"),
    "other widths": ({"block_out_channels": [64, 128, 128]}, "shape .* instead of .*\n.*Give the"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_models_are_refused(tmp_path, name):
    change, message = CHANGES[name]
    described = DESCRIBED["ddpm"]
    arrays = {key: np.zeros(shape, np.float32) for key, shape in described["shapes"].items()}
    with pytest.raises(ValueError, match=message):
        diffusers.load(write(tmp_path, described["config"] | change, DDPM, arrays))


SCHEDULES = {
    "cosine": (
        DDPM | {"beta_schedule": "squaredcos_cap_v2"},
        "`beta_schedule` .* must be",
    ),
    "velocity": (DDPM | {"prediction_type": "v_prediction"}, "`prediction_type` .* must be"),
    "of another kind": (VE, "KeyError: 'beta_start'|KeyError: 'num"),
    "endless": (DDPM | {"num_train_timesteps": 10**12}, "num_train_timesteps of 1000000000000"),
    "a list": ([1, 2], "AttributeError"),
    "no signal at the end": (
        DDPM | {"rescale_betas_zero_snr": True},
        "`rescale_betas_zero_snr` .*",
    ),
    "betas of 1": (DDPM | {"beta_end": 1.0}, "beta_end of 0.0001 and 1.0, not between"),
    "betas below 0": (DDPM | {"beta_start": -0.1}, "beta_end of -0.1 and 0.02, not between"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_other_schedules_are_refused(tmp_path, name):
    scheduler, message = SCHEDULES[name]
    with pytest.raises(ValueError, match=message):
        diffusers.load(write(tmp_path, DESCRIBED["ddpm"]["config"], scheduler, {}))


WRONG = {
    "whole numbers": (
        lambda array: array.astype(np.int32),
        "differ:\n.*int32 instead of floating",
    ),
    "yes and no": (lambda array: array > 0, "differ:\n.*bool instead of floating"),
    "not a number": (lambda array: array * np.nan, "`conv_in.bias in .*` must be finite; 32 of"),
    "infinite": (lambda array: array + np.inf, "`conv_in.bias in .*` must be finite; 32 of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_of_another_kind_are_refused(tmp_path, name):
    change, message = WRONG[name]
    described = DESCRIBED["modern"]
    arrays = weights(described["shapes"])
    arrays["conv_in.bias"] = change(arrays["conv_in.bias"])
    with pytest.raises(ValueError, match=message):
        diffusers.load(write(tmp_path, described["config"], EPSILON, arrays))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(archive(b"(N" + text("a") + b"t."))
    with pytest.raises(ValueError, match="bin` must hold arrays by their names; got tuple"):
        diffusers.load(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="must hold config.json; got .* Give the folder of a"):
        diffusers.load(tmp_path)
    folder = stored("modern", tmp_path)
    with pytest.raises(ValueError, match="of SHA-256 00, whole"):
        diffusers.load(folder, sha256="00")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.bin .*No such file"):
        diffusers.load(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="must hold config.json"):
        diffusers.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_networks_of_the_published_depth_agree_with_diffusers(tmp_path, kind):
    """Made and run here where the extra `compare` is installed."""
    pytest.importorskip("diffusers")
    config, scheduler, size, times = WHOLE[kind]
    shapes, x, out = evaluate(config, size, times)
    model = diffusers.load(write(tmp_path, config, scheduler, weights(shapes)))
    got = jax.jit(jax.vmap(model.net_fn))(x.transpose(0, 2, 3, 1), jnp.asarray(times))
    assert_close(got, out.transpose(0, 2, 3, 1))


def published():
    config = json.loads((DATA / "vp_ddpmpp.json").read_text())
    return score_sde.load(DATA / "vp_ddpmpp.pth", config)


def assert_same_file(tmp_path, model):
    """Saved, read and saved again: the same bytes, so the same numbers, fields and functions."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_pretrained(first, model)
    again = load_pretrained(first)
    save_pretrained(second, again)
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (first, second)]
    assert digests[0] == digests[1]
    assert again.net == model.net and again.sde == model.sde
    assert again.data_range == model.data_range and again.shape == model.shape
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
    return again


def test_published_models_survive_our_own_file(tmp_path):
    assert assert_same_file(tmp_path, published()).shape == (16, 16, 3)
    model = diffusers.load(stored("modern", tmp_path))
    again = assert_same_file(tmp_path, model)
    levels = [m.score_fn.args[1].args[2] for m in (model, again)]
    np.testing.assert_array_equal(*levels)


def mlp(sde, make, **options):
    net = ss.nets.MLP(width=8, depth=1, **options)
    params = net.init(jax.random.key(0), jnp.zeros(2), 0.5)
    params = jax.tree.map(lambda p: p + 0.1, params)  # the output starts at zero
    net_fn = Partial(net.apply, params)
    return score_sde.Pretrained(net, params, sde, (-1.0, 1.0), make(sde, net_fn), net_fn)


MAKERS = {
    "noise": (ss.VP(beta_max=15.0), ss.score_from_noise),
    "denoiser": (ss.SubVP(), ss.score_from_denoiser),
    "velocity": (ss.VP(t0=np.float32(1e-3)), ss.score_from_velocity),
    "preconditioned": (
        ss.VE(sigma_max=9.0),
        lambda sde, net_fn: ss.score_from_preconditioned(sde, net_fn, sigma_data=0.5),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_own_models_survive_our_own_file(tmp_path, name):
    sde, make = MAKERS[name]
    model = mlp(sde, make, dtype=jnp.bfloat16 if name == "noise" else None)
    again = assert_same_file(tmp_path, model)
    x = jnp.array([0.3, -0.4])
    np.testing.assert_array_equal(again.score_fn(x, 0.7), model.score_fn(x, 0.7))
    np.testing.assert_array_equal(again.net_fn(x, 0.7), model.net_fn(x, 0.7))


def test_what_cannot_be_made_again_is_not_saved(tmp_path):
    path = tmp_path / "a.safetensors"
    model = mlp(ss.VP(), ss.score_from_noise)
    other = model._replace(score_fn=Partial(lambda x, t: -x))
    with pytest.raises(ValueError, match="must have functions of its net.*got '<lambda>'. Save"):
        save_pretrained(path, other)
    stale = model._replace(params=jax.tree.map(lambda p: 2 * p, model.params))
    with pytest.raises(ValueError, match="must have functions of its net, its params"):
        save_pretrained(path, stale)
    energy = model._replace(net=ss.nets.EnergyMLP())
    with pytest.raises(ValueError, match="must have (functions of its net|a network)"):
        save_pretrained(path, energy)
    net_fn = Partial(model.net.apply, jax.tree.map(lambda p: p * jnp.nan, model.params))
    broken = model._replace(params=net_fn.args[0], net_fn=net_fn)
    with pytest.raises(ValueError, match="`pretrained.params` must be finite; .* nan or infinite"):
        save_pretrained(path, broken)
    assert not path.exists()


HOSTILE = {
    "a class of elsewhere": {"net": {"class": "os.system"}},
    "an SDE for a network": {"net": {"class": "VP"}},
    "another field": {"sde": {"class": "VP", "__init__": 1}},
    "a bad number": {"sde": {"class": "VP", "beta_min": -1.0}},
    "a function of elsewhere": {"score_fn": {"function": "eval", "args": ["1"]}},
    "an array that is not there": {"score_fn": "7"},
    "no range": {"data_range": [0.0]},
    "no image": {"shape": [4, 4, 0]},
    "endless depth": {"net": {"class": "MLP", "width": 8, "depth": 10**6}},
    "endless blocks": {"net": {"class": "UNet", "num_blocks": 10**6}},
    "endless levels": {"net": {"class": "UNet", "multipliers": [1] * 10**6}},
    "nothing": None,
}


def resave(path, tree, metadata):
    """With the digest that belongs to it."""
    if metadata is not None:
        metadata = {key: value for key, value in metadata.items() if key != "sha256"}
        metadata["sha256"] = export._digest(tree, metadata)
    ss.save_params(path, tree, metadata)


@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_files_are_refused(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_pretrained(path, mlp(ss.VP(), ss.score_from_noise))
    params, metadata = ss.load_params(path)
    resave(path, params, HOSTILE[name] and metadata | HOSTILE[name])
    with pytest.raises(ValueError, match="must be|arrays for [14]000000 blocks"):
        load_pretrained(path)


@pytest.mark.parametrize("name", ["missing", "unexpected", "float32\\[3, 2\\] instead"])
def test_parameters_of_another_network_are_refused(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_pretrained(path, mlp(ss.VP(), ss.score_from_noise))
    tree, metadata = ss.load_params(path)
    layers = tree["params"]["params"]
    layers |= {"unexpected": {"more": {"bias": jnp.ones(3)}}}.get(name, {})
    if name == "missing":
        del layers["time_0"]
    elif name != "unexpected":
        layers["input"]["kernel"] = jnp.ones((3, 2))
    resave(path, tree, metadata)
    with pytest.raises(ValueError, match=f"differ:\n  params/.*{name}"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("bias", "message"),
    [(jnp.full(8, jnp.nan), "must be finite; 8 of"), (jnp.ones(8, int), "must be floating point")],
    ids=["not a number", "whole numbers"],
)
def test_parameters_of_another_kind_are_refused(tmp_path, bias, message):
    path = tmp_path / "a.safetensors"
    save_pretrained(path, mlp(ss.VP(), ss.score_from_noise))
    tree, metadata = ss.load_params(path)
    tree["params"]["params"]["time_0"]["bias"] = bias
    resave(path, tree, metadata)
    with pytest.raises(ValueError, match=f"a.safetensors` {message}"):
        load_pretrained(path)


def test_a_flipped_bit_of_our_own_file_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_pretrained(path, mlp(ss.VP(), ss.score_from_noise))
    content, whole = path.read_bytes(), ss.load_params(path)
    draw = random.Random(0)  # noqa: S311
    for _ in range(200):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="`path` must be a (safetensors )?file"):
            load_pretrained(path)
    path.write_bytes(content)
    assert load_pretrained(path).sde == ss.VP()
    ss.save_params(path, whole[0], {k: v for k, v in whole[1].items() if k != "sha256"})
    with pytest.raises(ValueError, match="KeyError: 'sha256'"):
        load_pretrained(path)


def test_our_own_file_is_verified(tmp_path):
    path = tmp_path / "a.safetensors"
    save_pretrained(path, mlp(ss.VP(), ss.score_from_noise))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_pretrained(path, sha256=digest).sde == ss.VP()
    with pytest.raises(ValueError, match="must be of SHA-256 00, whole"):
        load_pretrained(path, sha256="00")
    with pytest.raises(ValueError, match="at most `max_bytes` = 100 bytes"):
        load_pretrained(path, max_bytes=100)


def test_the_command_converts_and_answers_in_one_line(tmp_path, capsys):
    out, config = tmp_path / "out.safetensors", DATA / "vp_ddpmpp.json"
    assert main([str(DATA / "vp_ddpmpp.pth"), "--config", str(config), "--out", str(out)]) == 0
    assert "over VP(beta_min=0.1" in capsys.readouterr().out
    again, model = load_pretrained(out), published()
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
    folder = stored("modern", tmp_path / "folder")
    assert main([str(folder), "--out", str(out), "--sha256", "00"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(folder), "--out", str(out)]) == 0
    assert load_pretrained(out).sde.t0 == pytest.approx(9.16e-4, rel=1e-3)
    capsys.readouterr()
    for wrong in (["--out"], [str(folder)], [str(folder), "--out", "a", "--config", "b"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "see --help" in err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "absent.pth"), "--config", str(config), "--out", str(out)])
    assert "absent.pth does not exist; see --help" in capsys.readouterr().err
    bad = tmp_path / "bad.json"
    for content, words in (("{", "bad.json is not JSON (Expecting"), ("[1]", "flat dictionary")):
        bad.write_text(content)
        assert main([str(DATA / "vp_ddpmpp.pth"), "--config", str(bad), "--out", str(out)]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err
