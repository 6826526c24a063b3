"""What was saved is restored, or nothing is; a run that ends early goes on as if it had not."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sde_score as ss
from benchmarks import kill_resume
from sde_score._checks import ArgumentError

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def state_at(step):
    state = ss.init_train_state(PARAMS, OPTIMIZER)
    scaled = jax.tree.map(lambda x: x * (1.0 + step), state.params)
    return state._replace(step=jnp.int32(step), params=scaled)


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 10, 20, 30."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with contextlib.closing(ss.Checkpoints(folder, config={"width": 3})) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(state_at(step), {"loss": 1.0 / step})
    return folder


def test_a_state_comes_back_with_its_structure(saved):
    with contextlib.closing(ss.Checkpoints(saved, config={"width": 3})) as checkpoints:
        restored = checkpoints.restore(state_at(0))
    assert equal(restored, state_at(30))
    assert jax.tree.structure(restored) == jax.tree.structure(state_at(0))
    record = json.loads((saved / "00000030.json").read_text())
    assert record["versions"]["jax"] == jax.__version__ and "cpu" in record["device"]


def test_the_last_and_the_best_are_kept(tmp_path):
    with contextlib.closing(ss.Checkpoints(tmp_path, keep=2, best="loss")) as checkpoints:
        for step, loss in ((1, 3.0), (2, 0.5), (3, 2.0), (4, 1.0), (5, 4.0)):
            checkpoints.save(state_at(step), {"loss": loss})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{step:08d}{end}" for step in (2, 4, 5) for end in ("", ".json")}


def test_what_differs_is_shown(saved):
    other = {"w": jnp.zeros((2, 4)), "b": jnp.ones(3, jnp.bfloat16)}
    like = ss.init_train_state(other, OPTIMIZER)
    with contextlib.closing(ss.Checkpoints(saved, config={"width": 4})) as checkpoints:
        with pytest.raises(ArgumentError) as error:
            checkpoints.restore(like)
    message = str(error.value)
    assert "config.width: 3 in the checkpoint, 4 now" in message
    assert "['b']: float32[3] in the checkpoint, bfloat16[3] now" in message


def corrupt(folder, draw):
    """One fault in the newest checkpoint; returns the file at fault."""
    newest = folder / "00000030"
    files = sorted(path for path in newest.rglob("*") if path.is_file()) + [
        newest.with_suffix(".json")
    ]
    path, kind = draw.choice(files), draw.choice(["flip", "cut", "delete", "zero", "swap", "add"])
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = folder / "00000020" / path.relative_to(newest) if path.parent != folder else None
        other = folder / "00000020.json" if other is None else other
        if other.exists() and other.read_bytes() != bytes(data):
            path.write_bytes(other.read_bytes())
        else:
            path.unlink()
    elif kind == "add" and path.parent != folder:
        path.with_name("stray").write_bytes(b"0")
    elif kind == "cut" and data:
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "zero" and any(data):
        path.write_bytes(bytes(len(data)))
    else:  # an empty file gains a byte
        data = data or bytearray(1)
        position = draw.randrange(8 * len(data))
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_corruption_is_restored(saved, tmp_path, count):
    """Bit flips, truncation, deletion, zeroing, swaps between steps, additions: step 20 returns.

    A flip inside the manifest's white space is none: JSON is read, not its bytes. Then step 30
    returns, as it was saved.
    """
    draw, harmless = random.Random(0), 0  # noqa: S311
    for i in range(count):
        folder = tmp_path / str(i)
        shutil.copytree(saved, folder)
        corrupt(folder, draw)
        checkpoints = ss.Checkpoints(folder, config={"width": 3})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.closing(checkpoints):
                restored = checkpoints.restore(state_at(0))
        assert equal(restored, state_at(int(restored.step))), i
        assert int(restored.step) in (20, 30)
        harmless += int(restored.step) == 30
        shutil.rmtree(folder)
    print(f"{count} corruptions, {harmless} of them without effect, none restored wrong")
    assert harmless <= 0.02 * count


def test_a_damaged_file_is_named_and_where_all_are_nothing_starts(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (10, 20, 30):
        (tmp_path / f"000000{step}" / "_METADATA").write_bytes(b"{}")
    words = "`folder` must hold a whole checkpoint.*00000030/_METADATA is damaged"
    with contextlib.closing(ss.Checkpoints(tmp_path, config={"width": 3})) as checkpoints:
        for _ in range(2):  # it stays so: nothing starts anew over what is there
            with pytest.raises(ArgumentError, match=words):
                checkpoints.restore(state_at(0))
        (tmp_path / "00000020" / "_METADATA").write_bytes(
            (saved / "00000020" / "_METADATA").read_bytes()
        )
        with pytest.warns(UserWarning, match="_METADATA is damaged: this checkpoint is not"):
            assert equal(checkpoints.restore(state_at(0)), state_at(20))
    assert (tmp_path / "damaged-00000030").is_dir()


def test_what_is_not_a_checkpoint_s_is_left_alone_and_a_lost_manifest_is_told(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for name in ("2026-results", "3d_scans"):
        (tmp_path / name).mkdir()
    (tmp_path / "2025.json").write_text("{}")
    (tmp_path / "00000030.json").unlink()
    with contextlib.closing(ss.Checkpoints(tmp_path, config={"width": 3})) as checkpoints:
        with pytest.warns(UserWarning, match="00000030 has no manifest"):
            assert equal(checkpoints.restore(state_at(0)), state_at(20))
    assert {"2026-results", "3d_scans", "2025.json"} <= {path.name for path in tmp_path.iterdir()}


def test_an_optimiser_s_key_is_restored(tmp_path):
    optimizer = optax.chain(optax.adam(1e-2), optax.add_noise(0.1, 0.5, jax.random.key(3)))
    state = ss.init_train_state(PARAMS, optimizer)
    with contextlib.closing(ss.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(ss.init_train_state(PARAMS, optimizer))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, want in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        assert got.dtype == want.dtype and bool(jnp.all(got == want))


def test_a_best_metric_that_is_no_number_is_none(tmp_path):
    with contextlib.closing(ss.Checkpoints(tmp_path, keep=1, best="loss")) as checkpoints:
        for step, loss in ((1, np.nan), (2, 1.0), (3, 2.0)):
            checkpoints.save(state_at(step), {"loss": loss})
    assert {path.stem for path in tmp_path.glob("*.json")} == {"00000002", "00000003"}


FULL_DISK = """
import contextlib, pathlib, resource, sys
import jax, jax.numpy as jnp, optax
import sde_score as ss

folder, config = pathlib.Path(sys.argv[1]), {"width": 3}
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
small = ss.init_train_state({"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}, optimizer)
large = {"w": jnp.ones(4_000), "b": jnp.ones(3)}
large = ss.init_train_state(large, optimizer)._replace(step=jnp.int32(40))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for point in range(20):
    checkpoints, words = ss.Checkpoints(folder, config=config), "no error"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * point, hard))
    try:
        checkpoints.save(large)
        checkpoints.wait()
    except OSError as error:
        words = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "could not be written" in words, (point, words)
    with contextlib.suppress(Exception):  # orbax's own threads are broken now
        checkpoints.close()
    with contextlib.closing(ss.Checkpoints(folder, config=config)) as checkpoints:
        assert int(checkpoints.restore(small).step) == 30, point
"""


def test_a_full_disk_leaves_the_last_good_step(saved, tmp_path):
    """Files that may not grow beyond a limit: 20 of them, from nothing to all but the arrays."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written"):
        ss.Checkpoints(tmp_path / "file" / "folder")
    with pytest.raises(OSError, match="could not be written"):
        ss.Checkpoints("/proc/none")  # where nobody may write


def run(folder, num_steps=60, *, wrap=lambda loss: loss, mesh=None, **options):
    """Ordinary least squares of a line, trained."""
    x = jax.random.normal(jax.random.key(0), (64, 3))
    data = (x, x @ jnp.array([1.0, -2.0, 0.5]))

    def loss(params, key, batch):
        noise = 0.1 * jax.random.normal(key, batch[1].shape)
        return jnp.mean((batch[0] @ params["w"] - batch[1] + noise) ** 2)

    batches = ss.data.batches(jax.random.key(1), data, 16)
    defaults = {"save_every": 20, "log_every": 10, "report": None, "config": {"a": 1}}
    arguments = {"num_steps": num_steps, "folder": folder} | defaults | options
    params = {"w": jnp.zeros(3)}
    if mesh is not None:
        params, batches = ss.replicate(params, mesh), ss.shard_batches(batches, mesh)
    return ss.train(jax.random.key(2), wrap(loss), params, OPTIMIZER, batches, **arguments)


def test_a_run_in_parts_is_the_run(tmp_path):
    """In scanned chunks; and the trained parameters are those of `fit` up to the last digits."""
    whole = run(tmp_path / "whole")
    for steps in (20, 35, 60):
        parts = run(tmp_path / "parts", steps)
    assert equal(whole, parts) and int(whole.step) == 60
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    lines = [json.loads(line) for line in rows[0].splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[1]["loss_running"] == 0.9 * lines[0]["loss"] + (1 - 0.9) * lines[1]["loss"]
    # the run in parts has a row at 35, where it ended once; from 40 on they agree but for its mean
    last = [json.loads(text.splitlines()[-1]) for text in rows]
    assert last[0]["loss"] == last[1]["loss"] and last[0]["grad_norm"] == last[1]["grad_norm"]


@pytest.mark.parametrize("mesh", [None, ss.make_mesh()], ids=["free", "mesh"])
def test_two_thousand_steps_neither_grow_nor_compile(mesh, tmp_path, caplog):
    """From the fifth row on: arrays on the device (within 1 KiB, of a save in the background) and
    (within 8 MiB, of an allocator) the process's peak memory; one trace and one compilation in
    all, a shorter last row included.
    """
    seen = []

    def look(state):
        arrays = sum(x.nbytes for x in jax.live_arrays())
        seen.append((arrays, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))
        return {}

    options = {"save_every": 200, "log_every": 100, "evaluate": look, "evaluate_every": 100}
    with jax.log_compiles(True):
        run(tmp_path, 2_010, wrap=partial(chex.assert_max_traces, n=1), mesh=mesh, **options)
    chex.clear_trace_counter()
    compiled = [r for r in caplog.records if r.getMessage().startswith("Compiling jit(_run_many)")]
    assert len(compiled) == 1
    arrays, peak = np.transpose(seen[4:])
    assert len(seen) == 21 and np.ptp(arrays) < 2**10 and peak[-1] - peak[0] < 8


def test_steps_outside_of_a_loop_and_a_feed_agree(tmp_path):
    looped, single = run(tmp_path / "loop", 20), run(tmp_path / "single", 20, scan=False)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # two programs: the order of sums
    x = jax.random.normal(jax.random.key(0), (64, 3))
    data = (x, x @ jnp.array([1.0, -2.0, 0.5]))
    batches = ss.data.batches(jax.random.key(1), data, 16)
    asked = []
    feed = lambda start, stop: asked.append((start, stop)) or batches  # noqa: E731
    fed = run(tmp_path / "fed", 20, feed=feed)
    assert equal(fed, looped) and asked == [(0, 10), (10, 20)]


def test_rows_after_the_restored_step_are_dropped_and_a_torn_one(tmp_path):
    whole = run(tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints" / "00000060")  # back to step 40
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "lo')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert equal(run(tmp_path), whole)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_resume_as_asked(tmp_path):
    with pytest.raises(ArgumentError, match="`resume` must not be True without a checkpoint"):
        run(tmp_path, resume=True)
    run(tmp_path, 20, resume=False)
    with pytest.raises(ArgumentError, match="`resume` must not be False where"):
        run(tmp_path, 40, resume=False)
    with pytest.raises(ArgumentError, match="config.a: 1 in the checkpoint, 2 now"):
        run(tmp_path, 40, config={"a": 2})
    with pytest.raises(ArgumentError, match="`save_every` must be a multiple of log_every=10"):
        run(tmp_path, save_every=15)
    assert int(run(tmp_path, 40, resume=True).step) == 40
    with pytest.raises(ArgumentError, match="`num_steps` must be at least the 40 of the check"):
        run(tmp_path, 20)


BAD_RUNS = {
    "log_every": ({"log_every": 0}, "`log_every` must be a Python integer"),
    "evaluate_every": ({"evaluate": lambda state: {}, "evaluate_every": 15}, "`evaluate_every`"),
    "batches": ({"feed": np.ones(3)}, "`batches` must be a function from step to batch, or"),
    "best": ({"best": "bits"}, "`best` must be among the metrics.*'loss_running'.*got 'bits'"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_runs(name, tmp_path):
    options, words = BAD_RUNS[name]
    with pytest.raises(ArgumentError, match=words):
        run(tmp_path, 20, **options)


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    def evaluate(state):
        with pytest.raises(ArgumentError, match="`folder` must not be that of another run"):
            run(tmp_path, 20)
        return {"evaluated": jnp.float32(1.0)}

    run(tmp_path, 20, evaluate=evaluate, evaluate_every=20, save_every=10_000)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["evaluated"] == 1.0


def test_a_line_that_is_no_row_is_told(tmp_path):
    run(tmp_path, 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\n" + path.read_bytes())
    with pytest.raises(ArgumentError, match="its line 1 is not"):
        run(tmp_path, 40)


def test_a_signal_ends_the_run_after_its_row(tmp_path, capsys):
    """In this process: the handlers are put back, and nothing of the run is lost."""
    before = signal.getsignal(signal.SIGTERM)

    def evaluate(state):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"evaluated": 1.0}

    with pytest.raises(ss.Preempted) as stopped:
        run(tmp_path, evaluate=evaluate, evaluate_every=30)
    assert stopped.value.code == 75 and signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: saved step 30. Resume with" in capsys.readouterr().err
    assert equal(run(tmp_path), run(tmp_path / "whole"))
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    assert row["evaluated"] == 1.0 and row["step"] == 30


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    x = jnp.where(jnp.arange(64)[:, None] == 5, 1e30, 1.0) * jnp.ones((64, 3))
    loss = lambda params, key, batch: jnp.sum((batch @ params["w"]) ** 2) * 1e10  # noqa: E731
    with pytest.raises(
        FloatingPointError, match=r"at step \d+.*, and params\['w'\] is not finite"
    ):
        ss.train(
            jax.random.key(2),
            loss,
            {"w": jnp.ones(3)},
            optax.sgd(1e10),
            ss.data.batches(jax.random.key(1), x, 16),
            num_steps=20,
            folder=tmp_path,
            save_every=10,
            log_every=10,
            report=None,
        )
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    """Of √Σw² at 0: its loss is 0."""
    loss = lambda params, key, batch: jnp.sqrt(jnp.sum(params["w"] ** 2))  # noqa: E731
    options = {"num_steps": 1, "save_every": 1, "log_every": 1, "folder": tmp_path}
    params, batches = {"w": jnp.zeros(3)}, ss.data.batches(jax.random.key(1), jnp.ones((9, 1)), 3)
    with pytest.raises(FloatingPointError, match="loss is 0.0 at step 0, its gradient's norm nan"):
        ss.train(jax.random.key(2), loss, params, optax.sgd(0.1), batches, **options)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_parts_of_a_batch_add_up():
    """For a loss without noise the mean over parts is the whole batch's gradient."""
    x = jax.random.normal(jax.random.key(0), (16, 3))
    loss = lambda params, key, batch: jnp.mean((batch @ params["w"]) ** 2)  # noqa: E731
    state = ss.init_train_state({"w": jnp.ones(3)}, optax.sgd(0.1))
    whole, parts = (
        ss.make_train_step(loss, optax.sgd(0.1), num_parts=n)(state, jax.random.key(n), x)
        for n in (1, 4)
    )
    np.testing.assert_allclose(whole[0].params["w"], parts[0].params["w"], rtol=1e-6)
    assert parts[1]["loss"] == pytest.approx(float(whole[1]["loss"]), rel=1e-6)
    with pytest.raises(ArgumentError, match="`num_parts` must divide the batch; got 3 for 16"):
        ss.make_train_step(loss, optax.sgd(0.1), num_parts=3)(state, jax.random.key(0), x)


def test_ten_kills_leave_no_trace():
    """SIGKILL at random moments, at least three inside a save: the same bits in the end."""
    totals = kill_resume.kill_runs(10, seed=1)
    assert totals["identical"] == totals["kills"] == 10 and totals["inside_save"] >= 3


@pytest.mark.slow
def test_fifty_signals_lose_no_step():
    totals = kill_resume.signal_runs(50, seed=1)
    print(totals)
    assert totals["identical"] == totals["clean"] == totals["signals"] == 50
