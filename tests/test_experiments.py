"""Every experiment runs quickly, writes what it says, and leaves nothing behind when it fails."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from nbclient import NotebookClient

import sde_score as ss
from benchmarks import _mixtures, bench_guidance, bench_networks, bench_samplers
from experiments import (
    _vae,
    controllable,
    diagnose,
    digits,
    ffjord_2d,
    finetune_flow,
    implicit_vae,
    interpolate,
    likelihood,
    neural_ode,
    objectives_2d,
    patches,
    pitfalls,
    pretrained,
    samplers,
    score_vs_kde,
    toy_2d,
)
from experiments._run import results_folder

ROOT = Path(__file__).parents[1]


# Small enough for a test: each stage runs, none is meant to be good.
SMALL = {
    digits: {"width": 32, "num_test": 20, "num_samples": 40, "num_steps": 100},
    toy_2d: {"width": 32, "num_test": 50, "num_samples": 200, "num_steps": 100, "resolution": 10},
}

FILES = {
    digits: {"samples.png", "loss.png", "score.safetensors", "metrics.json", "config.json"},
    toy_2d: {"figure.png", "score.safetensors", "metrics.json", "config.json"},
}
PROMISED = {
    digits: {
        *("bits_per_dim", "bits_per_dim_stderr", "gmm_bits_per_dim", "c2st", "c2st_stderr"),
        *("mmd", "energy_distance", "gmm_mmd", "gmm_energy_distance", "gmm_c2st", "train_c2st"),
        *("tolerance_term", "truncation_term", "prior_term", "train_seconds", "total_seconds"),
    },
    toy_2d: {"nll", "nll_gap", "nll_gap_stderr", "sde_mmd", "ode_c2st", "sde_energy_distance"},
}


@pytest.mark.parametrize("module", SMALL, ids=["digits", "toy_2d"])
def test_an_experiment_writes_what_it_promises(module, tmp_path):
    """Flat, finite metrics; the configuration; the figures; parameters that load again."""
    out = tmp_path / "nested" / "run"
    metrics = module.main(dataclasses.replace(module.QUICK, out=out, **SMALL[module]))
    assert json.loads((out / "metrics.json").read_text()) == pytest.approx(metrics)
    assert all(isinstance(value, float | int) for value in metrics.values())
    assert all(np.isfinite(value) for value in metrics.values())
    assert PROMISED[module] <= metrics.keys()
    assert json.loads((out / "config.json").read_text())["num_steps"] == 100
    assert {path.name for path in out.iterdir()} == FILES[module]
    params, metadata = ss.load_params(out / "score.safetensors")
    if module is toy_2d:  # its option takes them instead of training
        again = dataclasses.replace(module.QUICK, params=out / "score.safetensors", width=32)
        chex.assert_trees_all_equal(
            toy_2d.train_score(jax.random.key(1), again, np.ones((4, 2))), params
        )
        assert metadata["sde"]["type"] == "VP"
    net = ss.nets.MLP(metadata["width"], metadata["depth"])
    shape = (8, 8, 1) if module is digits else (2,)
    assert net.apply(params, np.ones(shape, np.float32), 0.5).shape == shape
    if module is digits:
        assert metrics["prior_term"] < 1e-4 and metrics["tolerance_term"] < 0.01
        # All 297 held-out digits give 2.59; the 20 digits here have a standard error of about 0.1.
        assert 2.2 < metrics["gmm_bits_per_dim"] < 3.0


@pytest.mark.slow
def test_objectives_on_the_plane(tmp_path):
    """Every objective beats the zero score within 100 steps, and two log Z of the energy agree."""
    small = {"width": 16, "depth": 1, "energy_widths": (16,), "num_steps": 100, "num_train": 2_000}
    small |= {"num_samples": 20, "langevin_steps": 20, "num_test": 50, "resolution": 40}
    small |= {"data": "eight_gaussians", "num_importance": 5_000}
    config = dataclasses.replace(objectives_2d.QUICK, **small)
    metrics = objectives_2d.main(dataclasses.replace(config, out=tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"scores.png", "samples.png", "energy.png", "params.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"metrics.json", "config.json"}
    names = ("explicit", "implicit", "sliced", "finite_difference", "denoising", "energy")
    for name in names:
        assert metrics[f"{name}_fisher"] < metrics["zero_fisher"]
        assert {f"{name}_curl_stderr", f"{name}_energy_distance_stderr"} <= metrics.keys()
    difference = abs(metrics["log_z"] - metrics["log_z_importance"])
    error = metrics["log_z_importance_stderr"] + metrics["log_z_quadrature_error"]
    assert difference < 5 * error and metrics["log_z_quadrature_error"] < 1e-3
    again = dataclasses.replace(config, params=tmp_path / "params.safetensors")
    models = objectives_2d._models(again, lambda x: -x)
    params = objectives_2d._train(jax.random.key(1), again, models, np.ones((512, 2), np.float32))
    chex.assert_trees_all_equal(params, ss.load_params(tmp_path / "params.safetensors")[0])


def test_the_noised_density_by_quadrature(x64):
    """Of the eight Gaussians it is a mixture too, with variance 0.175² + sigma²."""
    sigma, angles = 0.1, np.arange(8) * np.pi / 4
    means = 1.4 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    covariances = np.tile((0.175**2 + sigma**2) * np.eye(2), (8, 1, 1))
    mixture = ss.GaussianMixture(np.full(8, 1 / 8), means, covariances)
    for x in np.array([[1.3, 0.2], [0.0, 0.0], [-1.1, 1.4]]):
        got = objectives_2d.noised_log_prob(ss.data.eight_gaussians, sigma, x)
        np.testing.assert_allclose(got, mixture.log_prob(x), rtol=1e-5)  # of the quadrature


@pytest.mark.slow
def test_pitfalls_agree_with_their_closed_forms(tmp_path):
    """Of the weights the reverse SDE's is right and Langevin's is not, by 5 standard errors."""
    small = {"width": 16, "num_steps": 200, "num_samples": 2_000, "langevin_steps": 100}
    metrics = pitfalls.main(dataclasses.replace(pitfalls.QUICK, out=tmp_path, **small))
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {f"{name}.png" for name in ("line", "low_density", "weights", "sigma")}
    files |= {"score.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert abs(metrics["weight_reverse_sde_z"]) < 5 < abs(metrics["weight_langevin_z"])
    assert abs(metrics["weight_annealed_langevin_z"]) < 5
    for sigma in pitfalls.QUICK.sigmas:  # d/sigma² − E‖score‖², the modes being far apart
        name, exact = f"dsm_target_variance_{sigma:g}", 2 / sigma**2 - 2 / (1 + sigma**2)
        assert abs(metrics[name] - exact) < 5 * metrics[f"{name}_stderr"]
    fine, coarse = (f"dsm_gradient_variance_{sigma}" for sigma in ("0.01", "0.1"))
    stderr = np.hypot(metrics[f"{fine}_stderr"], 100 * metrics[f"{coarse}_stderr"])
    assert abs(metrics[fine] - 100 * metrics[coarse]) < 5 * stderr  # it goes like 1/sigma²
    assert metrics["line_loss_0"] < 2 * metrics["line_loss_exact_0.1"]  # lower than noise allows
    assert metrics["ssm_error_rare"] > 2 * metrics["ssm_error_data"]


@pytest.mark.slow
def test_samplers_beside_the_oracle(tmp_path):
    """By the exact score its samples are eight Gaussians', within 5 standard errors."""
    small = {"width": 16, "num_steps": 50, "num_samples": 800, "samplers": ("adams", "dopri5")}
    config = dataclasses.replace(samplers.QUICK, out=tmp_path, **small)
    metrics = samplers.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"model.png", "oracle.png", "film.png", "score.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"metrics.json", "config.json"}
    assert metrics["oracle_adams_evaluations"] == config.evaluations
    assert metrics["oracle_dopri5_evaluations"] > config.evaluations
    for name in small["samplers"]:
        distance, stderr = (
            metrics[f"oracle_{name}_energy_distance{part}"] for part in ("", "_stderr")
        )
        assert abs(distance) < 5 * stderr < metrics[f"model_{name}_energy_distance"]
    again = dataclasses.replace(config, params=tmp_path / "score.safetensors")
    params = samplers._train(jax.random.key(1), again)
    chex.assert_trees_all_equal(params, ss.load_params(tmp_path / "score.safetensors")[0])


@pytest.mark.slow
def test_the_doctor_finds_planted_faults(tmp_path):
    """Each at its own levels and at no other; the exact score is cleared, a trained one is not."""
    small = {"width": 16, "depth": 1, "short_steps": 10, "long_steps": 20, "num_levels": 10}
    metrics = diagnose.main(dataclasses.replace(diagnose.QUICK, out=tmp_path, num_keys=1, **small))
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"figure.png", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name in ("exact", "factor", "floor", "band"):
        assert metrics[f"{name}_found"] == metrics[f"{name}_faulty_levels"]
        assert metrics[f"{name}_false_alarms"] == 0 and metrics[f"{name}_max_z_elsewhere"] < 3.5
    assert metrics["exact_faulty_levels"] == 0 < metrics["band_faulty_levels"]
    assert metrics["short_training_max_z"] > 10 and metrics["exact_keys_alarmed"] == 0
    with pytest.raises(ValueError, match="`num_levels` must be at least 2"):
        dataclasses.replace(diagnose.QUICK, num_levels=1)


@pytest.mark.slow
def test_ffjord_on_the_plane(tmp_path):
    """Within 150 steps it is nearer to the density than the normal it starts from."""
    small = {"width": 16, "depth": 1, "num_steps": 150, "solver_steps": 4, "num_train": 2_000}
    small |= {"learning_rate": 2e-2, "num_test": 200, "num_samples": 200, "resolution": 30}
    config = dataclasses.replace(ffjord_2d.QUICK, **small)
    metrics = ffjord_2d.main(dataclasses.replace(config, out=tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"figure.png", "film.png", "field.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    # The eight, far apart, are log 8 above one of them; the normal is 1.4 nats above the truth.
    one = np.log(2 * np.pi * np.e * 0.175**2)
    np.testing.assert_allclose(metrics["entropy"], one + np.log(8), atol=0.02)
    assert metrics["nll_above_truth"] + 3 * metrics["nll_above_truth_stderr"] < 1.3
    assert abs(metrics["integral"] - 1) < 0.05  # a coarse grid
    assert min(metrics["num_evals"], metrics["sample_num_evals"]) > 10
    again = dataclasses.replace(config, params=tmp_path / "field.safetensors")
    params = ffjord_2d._train(jax.random.key(1), again, np.ones((512, 2), np.float32))
    chex.assert_trees_all_equal(params, ss.load_params(tmp_path / "field.safetensors")[0])


@pytest.mark.slow
def test_finetuning_a_probability_flow(tmp_path):
    """A score that is barely trained gains by likelihood, beyond 3 standard errors."""
    small = {"width": 16, "depth": 1, "num_steps": 60, "finetune_steps": 60, "solver_steps": 6}
    small |= {"num_train": 2_000, "batch_size": 128, "num_test": 200, "resolution": 30}
    small |= {"finetune_learning_rate": 1e-2}
    config = dataclasses.replace(finetune_flow.QUICK, out=tmp_path, **small)
    metrics = finetune_flow.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"figure.png", "loss.png", "score.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    gain = metrics["finetune_nll_before"] - metrics["finetune_nll_after"]
    assert metrics["finetune_gain"] == pytest.approx(gain, abs=1e-4)
    assert metrics["finetune_gain"] > 3 * metrics["finetune_gain_stderr"]
    for name in ("score_integral", "finetune_integral"):
        assert abs(metrics[name] - 1) < 0.05  # a coarse grid


@pytest.mark.slow
def test_an_implicit_encoder(tmp_path):
    """Two seeds for some steps: on the plane it has both modes, the Gaussian what lies between;
    the decoder learns.
    """
    small = {"width": 32, "num_steps": 60, "bimodal_steps": 800, "num_test": 10}
    small |= {"num_temperatures": 30, "num_chains": 4, "num_samples": 2_000}
    config = dataclasses.replace(implicit_vae.QUICK, out=tmp_path, **small)
    metrics = implicit_vae.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {f"{name}.png" for name in ("loss", "digits", "posterior", "bimodal")}
    files |= {"params.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    # trained to the end they have about 0.02 and 0.25
    assert 0 < metrics["implicit_kl"] < 0.15 < metrics["gaussian_kl"] < 0.4
    assert metrics["bimodal_weight_error"] < 0.1
    assert metrics["bimodal_between_error"] < 0.1 < metrics["gaussian_between_error"]
    assert 0 < metrics["gaussian_gradient_noise"] and 0 < metrics["implicit_gradient_noise"]
    for name in ("gaussian", "implicit", "gaussian_longer"):
        low, mean, high = (metrics[f"{name}_log_prob{end}"] for end in ("_low", "", "_high"))
        assert -64 * np.log(2) < mean < 0  # better than fair coins
        assert low < mean < high  # two seeds: wide


def test_implicit_vae_options_and_mnist(monkeypatch):
    """Limits of the configuration; MNIST as prepared, in its own shape, black and white."""
    for wrong, words in (
        ({"num_seeds": 1}, "`num_seeds` must lie in 2"),
        ({"num_test": 298}, "`num_test` must lie in 10 … 297"),
        ({"num_samples": 3}, "`num_samples` must lie in 100"),
        ({"data": "mnist"}, "`data_dir` must be given for mnist"),
    ):
        with pytest.raises(ValueError, match=words):
            implicit_vae.Config(**wrong)
    images = np.random.default_rng(0).integers(0, 256, (310, 28, 28, 1)).astype(np.uint8)
    examples = ss.data.Examples(images, np.arange(310) % 10)
    asked = []
    load = lambda name, *, data_dir, split: asked.append((name, str(data_dir), split)) or examples
    monkeypatch.setattr(implicit_vae.tfds, "load", load)
    config = implicit_vae.Config(data="mnist", data_dir=Path("prepared"), num_test=305)
    x, held_out, labels = implicit_vae._data(config)
    assert asked == [("mnist", "prepared", "train"), ("mnist", "prepared", "test")]
    np.testing.assert_array_equal(x, images >= 128)
    assert held_out.shape == (305, 28, 28, 1) and len(labels) == 305
    model = implicit_vae._image_model(config, x.shape[1:])
    params = model.decoder.init(jax.random.key(0), np.zeros(8, np.float32))
    assert model.decoder.apply(params, np.zeros(8, np.float32)).shape == (28, 28, 1)


def test_a_diverging_implicit_encoder_says_so_in_one_line(caplog):
    """Where its score or its draws leave the numbers inside the compiled run."""
    config = dataclasses.replace(implicit_vae.QUICK, score_learning_rate=1e30)
    model = _vae.Model(lambda params, z, x: -jnp.sum(z**2) * 1e30, None, 2, 4)
    with pytest.raises(FloatingPointError, match="^The implicit VAE diverged. Lower the learn"):
        _vae.train_all(jax.random.key(0), config, model, {"implicit": 20}, np.ones((128, 1)))
    assert not caplog.records


@pytest.mark.slow
def test_a_neural_ode_by_three_adjoints(tmp_path):
    """It learns digits, and the adjoint ODE's gradient is off by the solver's tolerance."""
    config = dataclasses.replace(neural_ode.QUICK, out=tmp_path, width=16, num_steps=40)
    metrics = neural_ode.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"loss.png", "params.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert metrics["test_accuracy"] > 0.7 and metrics["num_evals"] > 6
    assert metrics["direct_error"] < 1e-4 and 0 < metrics["backsolve_error"] < 0.05
    assert all(metrics[f"{name}_ms"] > 0 for name in neural_ode.ADJOINTS)


@pytest.mark.slow
def test_likelihoods_to_trust(tmp_path, monkeypatch):
    """The budget, and one density met twice: while sampling, and of the finished sample."""
    small = {"digits_steps": 60, "num_test": 12, "num_draws": 4, "num_samples": 8}
    small |= {"num_steps": 60, "num_held_out": 30, "width": 16}
    monkeypatch.setattr(likelihood, "MIXTURES", {"n_components": [1], "reg_covar": [1e-3]})
    config = dataclasses.replace(likelihood.QUICK, out=tmp_path, **small)
    metrics = likelihood.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"figure.png", "score.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert metrics["interval_low"] < metrics["bits_per_dim"] < metrics["interval_high"]
    # probes and dequantisation are shares of the standard error; the digits' own variance the rest
    shares = np.hypot(metrics["probes_term"], metrics["dequantization_term"])
    assert 0 < metrics["probes_term"] and shares < metrics["bits_per_dim_stderr"]
    assert metrics["prior_term"] < 1e-4 and 0 < metrics["tolerance_term"] < 0.01
    assert metrics["bound_bits_per_dim_stderr"] > 0 and metrics["truncation_term"] > 0
    # 5 standard errors of the probes, and the solver's tolerance
    assert abs(metrics["sampled_difference"]) < 5 * metrics["sampled_difference_stderr"] + 1e-3
    assert metrics["table_above_kde"] == pytest.approx(
        metrics["table_model_nats"] - metrics["table_kde_nats"], abs=1e-4
    )
    assert metrics["table_gmm_nats"] > metrics["table_kde_nats"]  # the table is nearly linear
    with pytest.raises(ValueError, match="`num_passes`.* must be at least 2"):
        dataclasses.replace(config, num_passes=1)


@pytest.mark.slow
def test_codes_of_digits(tmp_path):
    """They decode to the digits, whatever the network, and the line leaves their sphere."""
    config = dataclasses.replace(interpolate.QUICK, num_steps=60, num_test=20, out=tmp_path)
    metrics = interpolate.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    files = {"figure.png", "score.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert metrics["round_trip_rms"] < metrics["round_trip_max"] < 0.02  # tolerance 1e-5
    assert metrics["latent_correlation"] > 0.9 > metrics["latent_correlation_of_others"] + 0.3
    assert metrics["line_mean_square"] < 0.8 * metrics["arc_mean_square"]
    with pytest.raises(ValueError, match="`num_test` must lie in 2 num_pairs"):
        dataclasses.replace(config, num_test=4)


def test_the_benchmark_of_samplers_measures_what_it_says(x64):
    """Its loop is `sample_multistep`, its energy distance the library's, its floor reached."""
    gmm, sde = _mixtures.load_mixture("mixture_2d"), bench_samplers.SDES["vp"]
    score_fn, shape = ss.exact_score(gmm, sde), (3, 2)
    draw = bench_samplers.SAMPLERS["adams"].draw
    x = jax.random.normal(jax.random.key(0), shape)
    got, evaluations = draw(jax.random.key(1), score_fn, sde, ss.log_snr_grid, 6, x)
    options = {"method": ss.adams(3), "ts": ss.log_snr_grid(sde, 6), "finish": None}
    one = lambda x: ss.sample_multistep(jax.random.key(2), score_fn, sde, (2,), init=x, **options)
    assert evaluations == 6
    np.testing.assert_allclose(got, jax.vmap(one)(x), rtol=1e-10)  # rounding: it is compiled
    x, y = (_mixtures.exact_draws(key, gmm, (200,)) for key in jax.random.split(jax.random.key(3)))
    angles = np.pi * np.arange(64) / 64  # half a circle is enough; evenly is nearly exact
    along = [
        _mixtures.project(np.stack([np.cos(angles), np.sin(angles)], 1), z) for z in (1.3 * x, y)
    ]
    expected = ss.metrics.energy_distance(1.3 * x, y).value
    np.testing.assert_allclose(_mixtures.energy_distance(*along, 2), expected, rtol=1e-3)
    problem = bench_samplers.QUICK[0]._replace(samplers=("adams",))
    lines = list(bench_samplers.solve(problem))
    assert [line["name"] for line in lines[:: len(lines) - 1]] == [
        "sampler_floor",
        "sampler_to_floor",
    ]
    assert lines[-1]["reached"] and lines[-1]["sw2"] <= lines[0]["sw2_worst"]
    assert len(bench_samplers.figure(lines).axes) == 1


def test_the_benchmark_of_guidance_measures_what_it_says():
    """n exact draws have errors of 1/√n of the mean, in units of the total deviation; between ½
    and 2 times that over 3 observations.
    """
    line = next(bench_guidance.solve("mask_2d", 1_000, (), ()))
    assert line["method"] == "posterior" and 0.5 < line["mean_error"] * np.sqrt(1_000) < 2.0
    assert 0 < line["weight_error"] < 0.05 and 0 < line["covariance_error"] < 0.2


@pytest.mark.slow
def test_super_resolution_by_the_experiment_is_of_the_posterior():
    """For N(0, c² I) ΠGDM is exact, and as A Aᵀ = ¼ I the blocks' means given y are Gaussian with
    variance v = 1/(4/c² + 1/noise²) about v y/noise², within 5 standard errors; each pixel about
    these has ¾ c², up to the steps' bias of 2.5 %; and the completed keep what they show.
    """
    c, sde = 0.5, controllable.SDE
    options = {"num_draws": 50, "sample_steps": 400, "noise": 0.3, "pgdm_sigma": c}
    config = dataclasses.replace(controllable.QUICK, **options)
    score_fn = Partial(lambda x, t: -x / ((c * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2))
    problems = controllable._problems(config)["digits"]
    x0 = c * jax.random.normal(jax.random.key(0), (20, 8, 8, 1))
    problem = problems["super_resolution_pgdm"]
    seen, draws = controllable._solve(jax.random.key(1), score_fn, problem, x0)
    y, means = seen[:, None, ::2, ::2], draws.reshape(20, 50, 4, 2, 4, 2).mean((3, 5))[..., None]
    variance = 1 / (4 / c**2 + 1 / config.noise**2)
    z = (means - variance * y / config.noise**2) / np.sqrt(variance)
    assert abs(float(jnp.mean(z * y / jnp.std(y)))) < 5 / np.sqrt(z.size)
    np.testing.assert_allclose(jnp.mean(z**2), 1.0, atol=5 * np.sqrt(2 / z.size) + 0.025)
    inside = draws - jnp.repeat(jnp.repeat(means, 2, axis=2), 2, axis=3)
    np.testing.assert_allclose(jnp.mean(inside**2), 0.75 * c**2, rtol=0.05)
    _, draws = controllable._solve(jax.random.key(2), score_fn, problems["inpainting"], x0)
    assert np.array_equal(draws[:, :, :4], jnp.broadcast_to(x0[:, None, :4], (20, 50, 4, 8, 1)))
    psnr = controllable._psnr(0.2 * jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 1)))
    np.testing.assert_allclose(psnr, 20.0, rtol=1e-6)  # an error of a tenth of the range, in dB
    assert np.all(draws[:, :, 4:] != x0[:, None, 4:])


@pytest.mark.slow
def test_controllable_generation(tmp_path):
    """Within 600 steps guided digits are far above chance, and the mean beats the draws."""
    small = {"digits_steps": 600, "classifier_steps": 300, "patches_steps": 100, "num_digits": 20}
    small |= {"patch_width": 32, "sample_steps": 10, "num_resamples": 1}
    config = dataclasses.replace(controllable.QUICK, out=tmp_path, **small)
    metrics = controllable.main(config)
    files = {"classes.png", "digits.png", "patches.png", "params.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"metrics.json", "config.json"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    assert metrics["judge_accuracy"] > 0.85 and "super_resolution_accuracy" in metrics
    for name in ("conditional", "classifier_free", "classifier_guided"):
        assert metrics[f"{name}_accuracy"] > 0.1 + 3 * metrics[f"{name}_accuracy_stderr"]
        assert f"{name}_energy_distance_stderr" in metrics
    for problems in controllable._problems(config).values():
        for name in problems:
            gain = metrics[f"{name}_mean_psnr"] - metrics[f"{name}_psnr"]  # E over draws
            assert gain > 0.5 or name == "super_resolution" and gain > 0  # few particles are left
    again = dataclasses.replace(config, params=tmp_path / "params.safetensors")
    parts = ss.data.digits().train, controllable._small_patches().train
    params = controllable._train(jax.random.key(1), again, *parts)
    chex.assert_trees_all_equal(params, ss.load_params(tmp_path / "params.safetensors")[0])
    with pytest.raises(ValueError, match="`num_draws` must lie in 4"):
        dataclasses.replace(config, num_draws=3)


@pytest.mark.slow
def test_digits_by_a_unet(tmp_path):
    small = {"unet_width": 8, "unet_steps": 30, "num_test": 10, "num_samples": 10}
    config = dataclasses.replace(digits.QUICK, net="unet", out=tmp_path, **small)
    metrics = digits.main(config)
    assert {path.name for path in tmp_path.iterdir()} == FILES[digits]
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    assert PROMISED[digits] <= metrics.keys() and np.isfinite(metrics["bits_per_dim"])
    net = digits.make_net(config)
    params, *_ = ss.load_params(tmp_path / "score.safetensors")
    assert net.apply(params, np.ones((8, 8, 1), np.float32), 0.5).shape == (8, 8, 1)


@pytest.mark.slow
def test_patches_of_photographs(tmp_path):
    """Within 60 steps the score beats that of N(0, I) flowing to N(0, I): 1.33 + 7 bits."""
    small = {"num_steps": 60, "num_samples": 2, "stride": 32}
    config = dataclasses.replace(patches.QUICK, out=tmp_path, **small)
    metrics = patches.main(config)
    files = {"samples.png", "loss.png", "score.safetensors", "metrics.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    assert metrics["prior_term"] < 1e-4 and metrics["tolerance_term"] < 0.01
    assert metrics["gmm_bits_per_dim"] < metrics["bits_per_dim"] < 8.3
    below = metrics["gmm_bits_per_dim"] - metrics["bits_per_dim"]
    assert metrics["bits_below_gmm"] == pytest.approx(below, abs=1e-4)
    again = dataclasses.replace(config, params=tmp_path / "score.safetensors")
    params, _ = patches._train(jax.random.key(1), again, ss.data.patches(stride=32).train)
    chex.assert_trees_all_equal(params, ss.load_params(tmp_path / "score.safetensors")[0])
    with pytest.raises(ValueError, match="`fold` times two .* must divide 32; got 3"):
        dataclasses.replace(config, fold=3)


@pytest.mark.slow
def test_the_benchmark_of_networks_counts_what_it_says(capsys):
    """A line for each function, whose FLOP are those of the convolutions and some of the functions
    between them: a Jacobian product over twice a forward pass, a training step about three times.
    The depthwise convolution is the filter.
    """
    net = ss.nets.UNet(16, (1,), 1, attention_levels=())
    bench_networks.costs("tiny", net, 2, jnp.float32, 1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    flop = {line["name"]: line["gflop_per_s"] * line["median_s"] for line in lines}
    forward, jvp, step = (flop[f"network_tiny_{k}"] for k in ("forward", "jvp", "train_step"))
    assert 2 < jvp / forward < 2.8 < step / forward < 3.6
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    want = jax.vmap(lambda x: ss.nets.resample.downsample(x, ss.nets.presets.FIR_KERNEL))(x)
    got = bench_networks.depthwise(x, ss.nets.presets.FIR_KERNEL)
    np.testing.assert_allclose(got, want, atol=1e-6)  # order of sums


def test_squares_of_pixels_as_channels():
    """A network that keeps a square's first channels keeps the upper left pixel of each."""
    x = jax.random.normal(jax.random.key(0), (8, 4, 3))
    corners = patches.Folded(lambda x, c_noise, key: x * (np.arange(12) < 3)[None, None], 2)
    got = corners.apply({}, x, 0.0)
    want = np.zeros(x.shape, np.float32)
    want[::2, ::2] = x[::2, ::2]
    np.testing.assert_array_equal(got, want)


def zero_model():
    net, sde = ss.nets.UNet(4, (1,), 1, attention_levels=()), ss.VP()
    x = jax.ShapeDtypeStruct((4, 4, 3), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, 1.0)
    net_fn = Partial(net.apply, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes))
    score_fn = ss.score_from_noise(sde, net_fn)
    return ss.pretrained.Pretrained(net, *net_fn.args, sde, (0.0, 1.0), score_fn, net_fn)


@pytest.mark.slow
def test_a_saved_model_with_a_score_of_zero(tmp_path):
    """Its flow only shrinks: p(x) = (alpha_1/alpha_0)^D N(x alpha_1/alpha_0; 0, sigma_1²)."""
    model, sde = zero_model(), ss.VP()
    ss.pretrained.save_pretrained(tmp_path / "zero.safetensors", model)
    images = np.full((3, 4, 4, 3), 200, np.uint8)
    np.save(tmp_path / "images.npy", images)
    config = dataclasses.replace(
        *(pretrained.QUICK,),
        **{"checkpoint": tmp_path / "zero.safetensors", "images": tmp_path / "images.npy"},
        **{"image_size": 4, "num_steps": 3, "fast_steps": 2, "num_samples": 2},
        **{"tolerance": 1e-5, "out": tmp_path / "out"},
    )
    metrics = pretrained.main(config)
    files = {"samples.png", "metrics.json", "config.json"}
    assert {path.name for path in config.out.iterdir()} == files
    ratio, sigma = sde.alpha(sde.t1) / sde.alpha(sde.t0), sde.sigma(sde.t1)
    log_prob = jnp.log(ratio / sigma) - 0.5 * (jnp.log(2 * jnp.pi) + (ratio * 0.783 / sigma) ** 2)
    bits = -log_prob / np.log(2.0) + 8  # of a data range of length 1
    np.testing.assert_allclose(metrics["bits_per_dim"], bits, atol=1e-3)  # of the tolerance
    assert metrics["predictor_corrector_evaluations"] == 7 and metrics["fast_evaluations"] == 3


@pytest.mark.slow
def test_a_published_checkpoint(tmp_path):
    """From a .pth file to samples, which for random weights are within the prior's reach."""
    data = ROOT / "tests" / "data"
    config = dataclasses.replace(
        *(pretrained.QUICK,),
        **{"checkpoint": data / "vp_ddpmpp.pth", "config": data / "vp_ddpmpp.json"},
        **{"num_samples": 2, "num_steps": 4, "out": tmp_path},
    )
    metrics = pretrained.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert "bits_per_dim" not in metrics


def test_models_and_images_that_are_not_there(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4), np.uint8))
    own, images, data = tmp_path / "own.safetensors", tmp_path / "4.npy", ROOT / "tests" / "data"
    ss.pretrained.save_pretrained(own, zero_model())
    np.save(images, np.zeros((2, 4, 4, 3), np.uint8))
    published = {"checkpoint": data / "vp_ddpmpp.pth", "config": data / "vp_ddpmpp.json"}
    for change, words in (
        ({}, "`checkpoint` must be a file or folder; got None"),
        ({"checkpoint": tmp_path / "model.pth"}, "`config` must be given with"),
        (published | {"sha256": "00"}, "SHA-256 00"),
        ({"checkpoint": own, "sha256": "00"}, "SHA-256 00"),
        ({"checkpoint": own}, "`image_size` must be given"),
        (published | {"images": images}, r"shape .*, \(16, 16, 3\); got \(4, 4, 3\)"),
        (published | {"images": images, "image_size": 8}, r", \(8, 8, 3\); got \(4, 4, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            pretrained.main(dataclasses.replace(pretrained.QUICK, **change))
    with pytest.raises(ValueError, match=r"`images` must be uint8 \[n, H, W, C\].*\[2, 4, 4\]"):
        pretrained._read(tmp_path / "images.npz", (4, 4, 1))


def test_levels_and_model_values_invert_each_other():
    images = ss.data.digits().test.images
    x = digits.to_model(jax.random.key(0), images)
    assert -1 <= float(x.min()) and float(x.max()) < 1
    np.testing.assert_array_equal(digits.to_levels(x), images)


def test_a_failed_run_leaves_nothing(tmp_path):
    config = dataclasses.replace(toy_2d.QUICK, num_train=100, out=tmp_path / "run")
    with pytest.raises(ValueError, match="`batch_size` must be at most the number of examples"):
        toy_2d.main(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="`batch_size`"):
        toy_2d.main(dataclasses.replace(config, out=tmp_path / "deep" / "run"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="`batch_size`"):
        toy_2d.main(dataclasses.replace(config, out=tmp_path / "mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # the user's own stays


def test_impossible_configurations_are_refused_at_once():
    for change, words in (
        ({"num_test": 3}, "`num_test` must lie in 10 … 297; got 3"),
        ({"smoothing": 3.0}, "`smoothing` must lie in 0 … 1"),
        ({"num_probes": 1}, "`num_probes` must lie in 2"),
        ({"mixture_components": ()}, "`mixture_components` must hold"),
        ({"num_steps": -1}, "`num_steps` must be above 0; got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(digits.QUICK, **change)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder that can be written; got .*file"):
        with results_folder(tmp_path / "file" / "run", toy_2d.QUICK):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["--data", "--quick", "sde:ve", "--num-steps"]),
        (["--data", "three_moons"], 2, ["two_moons", "three_moons"]),
        (
            ["--quick", "--num-steps", "0"],
            2,
            ["`num_steps` must be above 0; got 0"],
        ),
        (["sde:ve", "--sde.sigma-min", "60"], 2, ["`sigma_min` must be below `sigma_max`"]),
    ],
)
def test_the_command_line(tmp_path, arguments, code, words):
    # Options of the configuration come before the name of the SDE, a subcommand.
    command = [
        sys.executable,
        "-m",
        "experiments.toy_2d",
        "--out",
        str(tmp_path / "run"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    text = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == code, text
    assert all(word in text for word in words), text
    assert "Traceback" not in text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(ROOT / "experiments" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("3_000", "300").replace("1_000", "100")
        cell.source = cell.source.replace("resolution=60", "resolution=10")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "nats from the truth" in printed


@pytest.mark.slow
def test_the_table_of_score_errors(tmp_path):
    """Each column for each d; the limit, the zero predictor and Silverman's kernel density as in
    their closed forms.
    """
    out = tmp_path / "run"
    config = dataclasses.replace(score_vs_kde.QUICK, dims=(3,), num_train=1_000, num_test=200)
    config = dataclasses.replace(config, epochs=20, width=16, stein_points=100, out=out)
    metrics = score_vs_kde.main(config)
    assert {path.name for path in out.iterdir()} == {"metrics.json", "config.json", "figure.png"}
    assert json.loads((out / "metrics.json").read_text()) == pytest.approx(metrics)
    for dim in config.dims:
        column = {name: metrics[f"{name}_d{dim}"] for name in score_vs_kde.COLUMNS}
        assert all(metrics[f"{name}_d{dim}_stderr"] > 0 for name in column)
        mean_norm = np.sqrt(2.0) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)
        np.testing.assert_allclose(column["zero"], mean_norm, rtol=0.2)
        assert column["limit"] < column["sliced"] < column["zero"]
        assert column["limit"] < column["kde"] < column["zero"]
    with pytest.raises(ValueError, match="`implicit_seeds` must lie in 2"):
        dataclasses.replace(config, implicit_seeds=1)
    with pytest.raises(ValueError, match="`weight_decays` must increase"):
        dataclasses.replace(config, weight_decays=(1.0, 0.0))
    # the second is best; the third, within a standard error of it, decays more; the last is off
    losses = np.array([[9.0, 9.5], [0.0, 1.0], [0.5, 0.6], [2.0, 3.0]])
    assert score_vs_kde._select(losses) == 2


@pytest.mark.slow
def test_sliced_score_matching_alone_learns_two_moons(tmp_path):
    """Samples within 1.5 × the energy distance of denoising score matching's at equal steps, plus
    the metric's standard error.
    """
    config = dataclasses.replace(toy_2d.Config(), num_steps=6_000, num_test=50, resolution=5)
    sliced, denoising = (
        toy_2d.main(dataclasses.replace(config, objective=name, out=tmp_path / name))
        for name in ("ssm", "dsm")
    )
    for sampler in ("sde", "ode"):
        name = f"{sampler}_energy_distance"
        print(f"{name}: sliced {sliced[name]:.5f}, denoising {denoising[name]:.5f}")
        assert sliced[name] <= 1.5 * denoising[name] + sliced[f"{name}_stderr"]


@pytest.mark.slow
def test_the_weight_decay_of_the_table_is_the_datas_choice():
    """The table's strongest decay would make the network linear, as a normal's score is: on eight
    Gaussians the same rule takes none, and the error is a fraction of the zero predictor's.
    """
    config = dataclasses.replace(score_vs_kde.Config(), num_seeds=2)
    density, net = ss.data.eight_gaussians, score_vs_kde.SkipMLP(config.width)
    x = density(jax.random.key(0), 20_000).reshape(2, 10_000, 2)
    unseen = density(jax.random.key(1), 1_000)
    truth = jax.vmap(jax.grad(density.log_prob))(unseen)
    distance = lambda score: float(np.mean(np.linalg.norm(score - truth, axis=1)))  # noqa: E731
    zero = distance(np.zeros_like(truth))
    for decays in (config.weight_decays, config.weight_decays[-1:]):
        chosen = dataclasses.replace(config, weight_decays=decays)
        params = score_vs_kde._train(jax.random.key(2), chosen, net, score_vs_kde._sliced, x)
        scores = jax.vmap(lambda p: jax.vmap(lambda x: net.apply(p, x))(unseen))(params)
        errors = [distance(np.asarray(score)) for score in scores]
        print(f"weight decays {decays}: errors {errors}, zero predictor {zero:.3f}")
        if len(decays) > 1:
            assert max(errors) < 0.25 * zero
        else:
            assert min(errors) > 0.75 * zero


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_moons", "eight_gaussians", "normal"])
def test_the_proposed_sigma_is_near_the_best(name):
    """Networks trained at nine sigmas from a quarter to four times the proposal: the least Fisher
    divergence to the data's own score lies within a factor of 2 of it.
    """
    normal = name == "normal"
    density = lambda key, n: (  # noqa: E731
        jax.random.normal(key, (n, 10)) if normal else getattr(ss.data, name)(key, n)
    )
    log_prob = (lambda x: -0.5 * x @ x) if normal else getattr(ss.data, name).log_prob
    x, test = density(jax.random.key(0), 10_000), density(jax.random.key(1), 4_000)
    truth = jax.vmap(jax.grad(log_prob))(test)
    sigmas = float(ss.propose_sigma(x)) * 2.0 ** np.linspace(-2.0, 2.0, 9)
    net, num_steps = score_vs_kde.SkipMLP(64), 4_000
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
    batches = ss.data.batches(jax.random.key(2), x, 256)

    @jax.jit
    @jax.vmap
    def error(sigma):
        def loss(params, key, batch):
            one = lambda key, x: (
                sigma**2
                * ss.single_sigma_score_matching(  # noqa: E731
                    key, Partial(net.apply, params), x, sigma=sigma
                )
            )
            return jnp.mean(jax.vmap(one)(jax.random.split(key, len(batch)), batch))

        step = ss.make_train_step(loss, optimizer)
        key = jax.random.key(3)
        move = lambda state, i: (step(state, jax.random.fold_in(key, i), batches(i))[0], 0)  # noqa: E731
        state = ss.init_train_state(net.init(jax.random.key(4), x[0]), optimizer)
        params = jax.lax.scan(move, state, jnp.arange(num_steps))[0].params
        scores = jax.vmap(lambda x: net.apply(params, x))(test)
        return 0.5 * jnp.mean(jnp.sum((scores - truth) ** 2, axis=1))

    errors = np.asarray(error(jnp.asarray(sigmas, jnp.float32)))
    best = sigmas[errors.argmin()]
    print(f"{name}: proposed {sigmas[4]:.4f}, best {best:.4f}; errors {np.round(errors, 3)}")
    assert 0.5 <= best / sigmas[4] <= 2.0
