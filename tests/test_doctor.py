"""Advice where it is due, and none where it is not."""

import jax
import numpy as np
import pytest

import sde_score as ss
from sde_score import doctor

DATA = np.asarray(ss.data.eight_gaussians(jax.random.key(0), 500))


@pytest.mark.parametrize(
    ("sde", "scale", "sigma_data", "words"),
    [
        (ss.VP(), 1.0, None, []),
        (ss.SubVP(), 1.0, 0.8, []),
        (ss.VE(sigma_max=3.0), 1.0, None, []),
        (ss.VE(sigma_max=300.0), 1.0, None, ["largest distance of two examples"]),
        (ss.VE(sigma_max=0.3), 1.0, None, ["The prior is off", "largest distance"]),
        (ss.VP(beta_max=3.0), 1.0, None, ["The prior is off by up to"]),
        (ss.VP(), 128.0, None, ["The prior is off", "this SDE expects about 1"]),
        (ss.VP(t0=0.1), 1.0, None, ["The least noise"]),
        (ss.VP(), 0.0, None, ["this SDE expects about 1", "around 0", "are constant"]),
        (ss.VP(), 1.0, 5.0, ["sigma_data = 5 should be the data's standard deviation"]),
    ],
)
def test_advice(sde, scale, sigma_data, words):
    advice = doctor.check_setup(sde, scale * DATA, sigma_data=sigma_data)
    assert len(advice) == len(words), advice
    assert all(word in line for word, line in zip(words, advice, strict=True)), advice


def test_images_that_were_not_centred_are_told():
    images = np.asarray(ss.data.digits().test.images) / 16.0
    assert any("centre them" in line for line in doctor.check_setup(ss.VP(), images))
    assert not doctor.check_setup(ss.VP(), 2.0 * images - 1.0)


def test_the_bound_of_the_prior_mismatch_is_the_formula():
    """½ (alpha/sigma)² E‖x‖² for data at (3, 4)."""
    sde = ss.VP(beta_max=1.0)
    (line,) = doctor.check_setup(sde, np.array([[3.0, 4.0], [-3.0, -4.0]]) / 5)
    ratio = float(sde.alpha(1.0) / sde.sigma(1.0))
    assert f"off by up to {0.5 * ratio**2:.3g} nats" in line


def test_the_command(tmp_path, capsys):
    np.save(tmp_path / "data.npy", DATA)
    doctor.main(["--data", str(tmp_path / "data.npy"), "--sde", "ve", "--sigma-max", "3"])
    out = capsys.readouterr().out
    assert jax.__version__ in out and "GiB in" in out and "The SDE suits the data." in out
    with pytest.raises(SystemExit, match="FileNotFoundError"):
        doctor.main(["--data", str(tmp_path / "none.npy")])
    with pytest.raises(SystemExit, match="sigma_max"):
        doctor.main(["--data", str(tmp_path / "data.npy"), "--sigma-max", "3"])
