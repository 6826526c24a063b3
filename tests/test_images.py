"""`experiments.images` as it is started: twice, and by two processes as SLURM starts them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sde_score as ss

ROOT = Path(__file__).parents[1]
SMALL = "--num-steps 20 --log-every 10 --save-every 10 --evaluate-every 20 --num-eval 4".split()


def start(out, *options, **environment):
    command = [sys.executable, "-m", "experiments.images", "--quick", *SMALL]
    command += [*options, "--out", str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    log = out.with_name(f"log-{environment.get('SLURM_PROCID', 0)}")  # no pipe, which may fill up
    with log.open("w") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, cwd=ROOT, **output)  # noqa: S603
    return process, log


def finish(started, *, fails=False):
    process, log = started
    process.wait(timeout=600)
    output = log.read_text()
    assert (process.returncode != 0) == fails, output[-2000:]
    return output


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "run"
    finish(start(out))
    return out


def parameters(out):
    params, _ = ss.load_params(out / "score.safetensors")
    leaves = [np.ravel(x) for x in _leaves(params)]
    return np.concatenate(leaves)


def _leaves(tree):
    return [x for v in tree.values() for x in _leaves(v)] if isinstance(tree, dict) else [tree]


@pytest.mark.slow
def test_the_same_command_twice(once, tmp_path):
    """Parameters, samples and metrics, bit for bit; a third time it has nothing left to train."""
    finish(start(tmp_path / "run"))
    names = ["metrics.jsonl", "metrics.json", "film.png", "film/00000020.npy"]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (once / name).read_bytes(), name
    np.testing.assert_array_equal(parameters(tmp_path / "run"), parameters(once))
    before = (once / "metrics.jsonl").read_bytes()
    finish(start(once, "--resume", "must"))
    assert (once / "metrics.jsonl").read_bytes() == before
    row = json.loads(before.splitlines()[-1])
    assert {"bound_bits_per_dim", "loss_level_4", "feature_distance", "grad_norm"} <= row.keys()


@pytest.mark.slow
def test_two_processes_as_slurm_starts_them(once, tmp_path):
    """Sharded parameters, each process half of the batch: the result of one process."""
    job = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_STEP_NODELIST": "localhost"}  # noqa: S311
    job |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    options = ("--distributed", "--shard-params")
    for started in [start(tmp_path / "run", *options, **job, **rank) for rank in ranks]:
        finish(started)
    got, want = parameters(tmp_path / "run"), parameters(once)
    relative = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"2 processes, 20 steps of a U-Net: {relative:.1e} relative")
    assert relative < 1e-5


@pytest.mark.slow
def test_a_dry_run_and_wrong_options(tmp_path):
    output = finish(start(tmp_path / "run", "--dry-run"))
    assert "gflops_per_step" in output and not (tmp_path / "run" / "metrics.json").exists()
    for options, words in (
        (("--batchsize", "3"), "--batch-size"),  # what was meant
        (("--data", "cifar10"), "`data_dir` must be given for cifar10"),
        (("--resume", "must"), "`resume` must not be True without a checkpoint"),
    ):
        output = finish(start(tmp_path / "other", *options), fails=True)
        assert words in output and "Traceback" not in output
