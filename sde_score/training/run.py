"""`train`: `fit` with checkpoints, for runs that outlive their process.

The key, the batch and the noise of a step are functions of (key, step), and a state is restored as
it was saved: a run that is killed and resumed ends where the run that was not ends, bit for bit on
a CPU.
"""

import contextlib
import fcntl
import os
import resource as usage
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from sde_score import _checks
from sde_score._typing import Key, Params, travelling
from sde_score.training.checkpoint import Checkpoints
from sde_score.training.logging import JsonLines, Report, report_progress
from sde_score.training.loop import check_finite, make_dispatch
from sde_score.training.state import LossFn, TrainState, init_train_state, make_train_step

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
_RUNNING = 0.9  # decay of the running mean of the loss, a row at a time


class Preempted(SystemExit):
    """A signal ended the run after its last step was saved; the process exits with status 75."""


def train(
    key: Key,
    loss_fn: LossFn,
    params: Params,
    optimizer: optax.GradientTransformation,
    batches: Callable[[Any], Any],
    *,
    num_steps: int,
    folder: str | os.PathLike,
    config: Any = None,
    resume: bool | None = None,
    save_every: int = 1000,
    log_every: int = 100,
    scan: bool = True,
    ema_decay: float = 0.999,
    num_parts: int = 1,
    keep: int = 3,
    best: str | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int = 10_000,
    feed: Callable[[int, int], Callable] | None = None,
    logger: Any = None,
    report: Report | None = report_progress,
) -> TrainState:
    """`fit`, saved to folder/checkpoints every `save_every` steps and resumed from there.

    `resume` True demands a checkpoint, False an empty folder, None takes what there is. Each
    `log_every` steps, one dispatch with `scan`, make a row of folder/metrics.jsonl: the loss, its
    running mean, the gradient's norm and, each `evaluate_every` steps, what evaluate(state)
    returns; folder/speed.jsonl has what no two runs share. `logger` replaces the first: an object
    with `JsonLines`'s methods. On SIGTERM, SIGINT or SIGUSR1 the row is finished and saved, and
    `Preempted` raised.

    Where data do not fit on the device, `feed(start, stop)` returns the function from step to
    batch of these steps, in place of `batches`. `config`, JSON, is compared when a run resumes.
    """
    _checks.check_key(key)
    _check_rows(num_steps, log_every, save_every, evaluate_every if evaluate else log_every)
    if not callable(batches if feed is None else feed):
        raise _checks.ArgumentError(
            f"`batches` must be a function from step to batch, or `feed` one of two steps; got "
            f"{_checks.describe(batches)}. Make one with sde_score.data.batches or stream."
        )
    folder, size = Path(folder), log_every if scan else 1
    batches = travelling(batches)
    state = init_train_state(params, optimizer)
    step_fn = make_train_step(loss_fn, optimizer, ema_decay=ema_decay, num_parts=num_parts)
    run = make_dispatch(step_fn, size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(folder))
        checkpoints = Checkpoints(folder / "checkpoints", config=config, keep=keep, best=best)
        stack.callback(checkpoints.close)
        arrived = stack.enter_context(_signals())
        stack.callback(getattr(feed, "close", lambda: None))
        state = _start(checkpoints, state, resume, num_steps)
        start = int(state.step)
        own = f"-{jax.process_index()}" if jax.process_index() else ""  # each process its files
        logger = JsonLines(folder / f"metrics{own}.jsonl") if logger is None else logger
        speed = JsonLines(folder / f"speed{own}.jsonl")
        stack.callback(logger.close)
        stack.callback(speed.close)
        speed.resume(start)
        running, examples = logger.resume(start).get("loss_running"), 0
        while start < num_steps:
            clock = time.perf_counter()
            stop = min(start - start % log_every + log_every, num_steps)
            some = batches if feed is None else travelling(feed(start, stop))
            state, found = _steps(run, state, key, some, start, stop, size)
            check_finite(found, start, state.params)
            seconds = time.perf_counter() - clock
            row = {"step": stop} | {name: float(x.mean()) for name, x in found.items()}
            running = row["loss"] if running is None else running
            running = row["loss_running"] = _RUNNING * running + (1 - _RUNNING) * row["loss"]
            last = stop == num_steps
            evaluated = last or stop % evaluate_every == 0
            if evaluate is not None and evaluated:
                row |= {name: float(value) for name, value in evaluate(state).items()}
            if evaluated or evaluate is None:
                _check_best(best, row)
            logger.write(row)  # before the save: no row of a restored step is missing
            examples = examples or _count_examples(some, start)
            speed.write(_speed(examples, start, stop, num_steps, seconds))
            if report is not None:
                report(start, stop, num_steps, row["loss"])
            number = _agreed(arrived)
            if number or last or stop % save_every == 0 or (evaluated and best is not None):
                checkpoints.save(state, row)
            if number:
                checkpoints.wait()
                _give_way(number, stop)
            start = stop
    return state


def _steps(
    run: Callable, state: TrainState, key: Key, batches: Callable, start: int, stop: int, size: int
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """The steps from `start` to `stop`, and their metrics."""
    rows = []
    try:
        for first in range(start, stop, size):
            state, metrics = run(state, key, batches, min(size, stop - first))
            rows.append(metrics)
        found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"Steps {start} to {stop} do not fit into the device's memory. Lower the batch size, "
            "raise `num_parts`, set the network's `remat` or dtype=jnp.bfloat16, or shard over "
            "more devices."
        ) from error
    return state, {name: x[: stop - start] for name, x in found.items()}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other run trains in the folder: a second one would take the first one's files away."""
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _checks.ArgumentError(
                f"`folder` must not be that of another run; got {folder}, where one trains. End "
                "it first, or choose another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def _start(
    checkpoints: Checkpoints, state: TrainState, resume: bool | None, num_steps: int
) -> TrainState:
    if resume is False:
        if any(checkpoints.folder.iterdir()):
            raise _checks.ArgumentError(
                f"`resume` must not be False where a run has left checkpoints; got the folder "
                f"{checkpoints.folder}. Choose another, or resume."
            )
        return state
    restored = checkpoints.restore(state)
    if restored is None and resume:
        raise _checks.ArgumentError(
            f"`resume` must not be True without a checkpoint; got the folder "
            f"{checkpoints.folder}, which has none. Begin with resume=None."
        )
    if restored is not None and int(restored.step) > num_steps:
        raise _checks.ArgumentError(
            f"`num_steps` must be at least the {int(restored.step)} of the checkpoint in "
            f"{checkpoints.folder}; got {num_steps}. Choose another folder."
        )
    return state if restored is None else restored


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that arrived, for the loop to look at; a second SIGINT interrupts at once."""
    arrived: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    try:
        before = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread, which alone may set handlers
        before = {}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(arrived: list[int]) -> int:
    """The signal that reached this process or another one, or 0."""
    number = arrived[0] if arrived else 0
    if jax.process_count() > 1:  # who stopped alone would leave the others waiting
        number = int(np.max(multihost_utils.process_allgather(np.int32(number))))
    return number


def _give_way(number: int, step: int) -> None:
    command = shlex.join(sys.orig_argv)
    name = signal.Signals(number).name
    sys.stderr.write(f"{name}: saved step {step}. Resume with\n  {command}\n")
    raise Preempted(EXIT_PREEMPTED)


def _count_examples(batches: Callable, step: int) -> int:
    """Of a batch: one, where its arrays have no leading axis."""
    leaves = jax.tree.leaves(jax.eval_shape(batches, np.int32(step)))
    return leaves[0].shape[0] if leaves and leaves[0].ndim else 1


def _speed(examples: int, start: int, stop: int, num_steps: int, seconds: float) -> dict[str, Any]:
    stats = jax.local_devices()[0].memory_stats() or {}
    host = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * 1024  # a CPU's memory
    rate = (stop - start) / seconds
    return {
        "step": stop,
        "time": time.time(),
        "steps_per_second": rate,
        "samples_per_second": rate * examples,
        "eta_seconds": (num_steps - stop) / rate,
        "peak_bytes": stats.get("peak_bytes_in_use", host),
    }


def _check_rows(num_steps: int, log_every: int, save_every: int, evaluate_every: int) -> None:
    for name, value in (("num_steps", num_steps), ("log_every", log_every)):
        _checks.check_count(name, value)
    for name, every in (("save_every", save_every), ("evaluate_every", evaluate_every)):
        _checks.check_count(name, every)
        if every % log_every:
            raise _checks.ArgumentError(
                f"`{name}` must be a multiple of log_every={log_every}; got {every}. A run is "
                "saved and evaluated where a row ends."
            )


def _check_best(best: str | None, row: dict[str, float]) -> None:
    if best is not None and best not in row:
        raise _checks.ArgumentError(
            f"`best` must be among the metrics, {list(row)}; got {best!r}."
        )
