"""Training runs that are killed at random moments, and end as the one that is not, bit for bit.

`python -m benchmarks.kill_resume --kills 200` prints one JSON line. Every run is killed ten times,
every other time inside a save, and then left to end; `identical` counts the kills of the runs
whose parameters, average, optimiser state and rows of metrics have the SHA-256 of the undisturbed
run.
`--signals 50` sends SIGTERM and SIGINT in turn: `clean` counts those that the run answered within
10 s by status 75, with the step of its last row saved.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_STEPS, EVERY = 400, 10
PER_RUN = 10
PATIENCE = 120  # seconds for a run to begin


def child(folder: Path) -> None:
    """One life of the run."""
    import jax
    import numpy as np
    import optax
    from jax.tree_util import Partial

    import sde_score as ss

    data_key, init_key, batch_key, fit_key = jax.random.split(jax.random.key(0), 4)
    x0, sde, net = ss.data.two_moons(data_key, 1_000), ss.VP(), ss.nets.MLP(width=32, depth=1)

    def loss(params: ss.Params, key: ss.Key, batch: jax.Array) -> jax.Array:
        return ss.dsm_loss(key, ss.score_from_noise(sde, Partial(net.apply, params)), sde, batch)

    state = ss.train(
        fit_key,
        loss,
        net.init(init_key, x0[0], 1.0),
        optax.adam(1e-3),
        ss.data.batches(batch_key, x0, 64),
        num_steps=NUM_STEPS,
        folder=folder,
        config={"name": "kill_resume"},
        save_every=EVERY,
        log_every=EVERY,
        report=None,
    )
    digest = hashlib.sha256((folder / "metrics.jsonl").read_bytes())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    (folder / "digest").write_text(digest.hexdigest())


def start(folder: Path) -> subprocess.Popen:
    cache = Path(tempfile.gettempdir()) / "sde_score_kill_resume"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--child", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)  # noqa: S603


def finish(folder: Path) -> str:
    process = start(folder)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"The run did not end: {errors}")
    return (folder / "digest").read_text()


def saving(folder: Path) -> bool:
    """A checkpoint is being written: there is a folder whose manifest is not there yet."""
    try:
        names = set(os.listdir(folder / "checkpoints"))
    except FileNotFoundError:
        return False
    return any(name[0].isdigit() and f"{name[:8]}.json" not in names for name in names)


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, process: subprocess.Popen, seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)
    return met


def live(folder: Path, number: int, draw: random.Random, *, in_save: bool) -> tuple | None:
    """Start the run, send it the signal at a random moment; (was it saving, status, seconds), or
    None where it had ended before.
    """
    process, before = start(folder), rows(folder)
    wait_until(lambda: rows(folder) != before, process)
    time.sleep(draw.uniform(0.0, 0.4))
    if in_save:
        wait_until(lambda: saving(folder), process, 5.0)
        time.sleep(draw.uniform(0.0, 0.05))
    began = time.monotonic()
    process.send_signal(number)
    process.communicate()
    inside = saving(folder)
    if process.returncode == 0:
        return None
    return inside, process.returncode, time.monotonic() - began


def kill_runs(kills: int, seed: int, per_run: int = PER_RUN) -> dict[str, float]:
    """`kills` kills by SIGKILL."""
    began, draw = time.monotonic(), random.Random(seed)  # noqa: S311
    totals = {"kills": 0, "inside_save": 0, "identical": 0}
    with tempfile.TemporaryDirectory() as root:
        reference = finish(Path(root) / "undisturbed")
        for run in range(kills):
            folder, here = Path(root) / f"run-{run}", 0
            while here < per_run and totals["kills"] + here < kills:
                found = live(folder, signal.SIGKILL, draw, in_save=here % 2 == 0)
                if found is None:
                    break
                here += 1
                totals["inside_save"] += found[0]
            totals["kills"] += here
            totals["identical"] += here * (finish(folder) == reference)
            if totals["kills"] >= kills:
                break
    return totals | {"seconds": round(time.monotonic() - began, 1)}


def signal_runs(signals: int, seed: int, per_run: int = PER_RUN) -> dict[str, float]:
    """`signals` preemptions by SIGTERM and SIGINT in turn."""
    began, draw = time.monotonic(), random.Random(seed)  # noqa: S311
    totals = {"signals": 0, "clean": 0, "identical": 0, "slowest_seconds": 0.0}
    with tempfile.TemporaryDirectory() as root:
        reference = finish(Path(root) / "undisturbed")
        for run in range(signals):
            folder, here = Path(root) / f"run-{run}", 0
            while here < per_run and totals["signals"] + here < signals:
                number = (signal.SIGTERM, signal.SIGINT)[here % 2]
                found = live(folder, number, draw, in_save=here % 4 < 2)
                if found is None:
                    break
                here += 1
                saved = max(path.stem for path in (folder / "checkpoints").glob("[0-9]*.json"))
                lossless = not found[0] and int(saved) == EVERY * rows(folder)
                totals["clean"] += lossless and found[1] == 75 and found[2] < 10.0
                totals["slowest_seconds"] = max(totals["slowest_seconds"], round(found[2], 2))
            totals["signals"] += here
            totals["identical"] += here * (finish(folder) == reference)
            if totals["signals"] >= signals:
                break
    return totals | {"seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
    if arguments.kills:
        print(json.dumps(kill_runs(arguments.kills, arguments.seed)), flush=True)
    if arguments.signals:
        print(json.dumps(signal_runs(arguments.signals, arguments.seed)), flush=True)


if __name__ == "__main__":
    main()
