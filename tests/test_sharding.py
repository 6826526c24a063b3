"""One program, placed on one device, on eight, on two processes: the same numbers."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sde_score as ss
from sde_score._checks import ArgumentError

SCRIPT = Path(__file__).with_name("sharded_run.py")


def start(folder, layout, *, devices=1, **options):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, str(SCRIPT), str(folder), layout]
    command += [f"--{name}={value}" for name, value in options.items()]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **output)  # noqa: S603


def start_two(folder, **options):
    port = free_port()
    return [start(folder, "data", process=i, port=port, **options) for i in range(2)]


def finish(*processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-2000:]


def result(folder):
    return np.load(folder / "result.npz")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The parameters by one device, from data in memory and streamed."""
    folders = {feed: tmp_path_factory.mktemp(feed) for feed in ("memory", "stream")}
    for feed, folder in folders.items():
        finish(start(folder, "one", feed=feed))
    return {feed: result(folder)["params"] for feed, folder in folders.items()}


def deviation(params, reference):
    return np.linalg.norm(params - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize(("layout", "feed"), [("data", "memory"), ("params", "stream")])
def test_eight_devices_agree_with_one(layout, feed, one_device, tmp_path):
    """And so do 8 that go on as 2, from a checkpoint."""
    finish(start(tmp_path, layout, devices=8, feed=feed, steps=50 if layout == "data" else 30))
    assert any("devices" in spec for spec in result(tmp_path)["shards"]) == (layout == "params")
    if layout == "params":
        finish(start(tmp_path, layout, devices=2, feed=feed))
    relative = deviation(result(tmp_path)["params"], one_device[feed])
    print(f"{layout} on 8 devices, 50 steps: {relative:.1e} relative")
    assert relative < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["memory", "stream"])
def test_two_processes_agree_with_one(feed, one_device, tmp_path):
    finish(*start_two(tmp_path, feed=feed, steps=30))
    finish(*start_two(tmp_path, feed=feed))
    relative = deviation(result(tmp_path)["params"], one_device[feed])
    print(f"2 processes, {feed}, 50 steps: {relative:.1e} relative")
    assert relative < 1e-6


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_restart_is_exact(tmp_path):
    """Within the heartbeat, 10 s, and 5 s more, with a message; the same command then goes on."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(*start_two(whole, steps=400))
    first, second = start_two(broken, steps=400)
    rows = broken / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 10):
        assert first.poll() is None, first.communicate()[0][-2000:]
        time.sleep(0.01)
    second.kill()
    began = time.monotonic()
    second.communicate()
    output, _ = first.communicate(timeout=60)
    seconds = time.monotonic() - began
    print(f"the other process ended after {seconds:.1f} s with status {first.returncode}")
    assert seconds < 15 and first.returncode != 0
    assert any(word in output for word in ("heartbeat", "unavailable", "Connection", "peer"))
    finish(*start_two(broken, steps=400))
    np.testing.assert_array_equal(result(broken)["params"], result(whole)["params"])


def test_bad_layouts():
    with pytest.raises(ArgumentError, match="`num_devices` must be at most 1"):
        ss.make_mesh(2)
