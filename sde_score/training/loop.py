"""`fit`: the training loop, several jitted steps for each dispatch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import Key, Params, travelling
from sde_score.training.logging import Report, report_progress
from sde_score.training.state import (
    LossFn,
    TrainState,
    TrainStep,
    init_train_state,
    make_train_step,
)


def fit(
    key: Key,
    loss_fn: LossFn,
    params: Params,
    optimizer: optax.GradientTransformation,
    batches: Callable[[Array], Any],
    *,
    num_steps: int,
    ema_decay: float = 0.999,
    steps_per_dispatch: int = 100,
    report: Report | None = report_progress,
) -> tuple[TrainState, np.ndarray]:
    """Minimise loss_fn(params, key, batch) for `num_steps`; returns the state and the loss of
    every step.

    `batches(step)` makes a batch, inside the jitted step; step i uses the key fold_in(key, i). All
    of `params` is trained: bind constants into the loss. A loss that is not finite raises
    FloatingPointError and names its step. Convolution gradients inside a loop are slow on the CPU:
    train such networks there with steps_per_dispatch=1.
    """
    _checks.check_key(key)
    _checks.check_count("num_steps", num_steps)
    _checks.check_count("steps_per_dispatch", steps_per_dispatch)
    if not callable(batches):
        raise _checks.ArgumentError(
            f"`batches` must be a function from step to batch; got {_checks.describe(batches)}. "
            "Make one with sde_score.data.batches(key, data, batch_size)."
        )
    state = init_train_state(params, optimizer)
    train_step = make_train_step(loss_fn, optimizer, ema_decay=ema_decay)
    run = make_dispatch(train_step, steps_per_dispatch)
    batches = travelling(batches)
    losses = np.empty(num_steps, np.float32)

    def settle(start: int, stop: int, metrics: dict[str, Array]) -> None:
        found = {name: np.asarray(x)[: stop - start] for name, x in metrics.items()}
        check_finite(found, start, state.params)
        losses[start:stop] = found["loss"]
        if report is not None:
            report(start, stop, num_steps, float(losses[start:stop].mean()))

    pending = []  # losses are read one dispatch late, so that the device never waits
    for start in range(0, num_steps, steps_per_dispatch):
        stop = min(start + steps_per_dispatch, num_steps)
        state, metrics = run(state, key, batches, stop - start)
        pending.append((start, stop, metrics))
        if len(pending) == 2:
            settle(*pending.pop(0))
    settle(*pending.pop())
    return state, losses


def make_dispatch(train_step: TrainStep, size: int) -> Callable:
    """The jitted (state, key, batches, count) -> (state, {"loss": [size], "grad_norm": [size]}),
    `count` ≤ `size` steps in one program; the metrics lie in front. The state is donated.
    """
    run = jax.jit(partial(_run_one if size == 1 else _run_many, train_step), donate_argnums=0)
    rows = {name: np.zeros(size, np.float32) for name in ("loss", "grad_norm")}
    return lambda state, key, batches, count: run(state, key, batches, rows, count)


def _run_many(
    train_step: TrainStep,
    state: TrainState,
    key: Key,
    batches: Callable,
    rows: dict[str, Array],
    count: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """In a loop. A count that is traced: one compilation."""

    def body(i: Array, carry: tuple) -> tuple:
        state, rows = carry
        state, metrics = train_step(
            state, jax.random.fold_in(key, state.step), batches(state.step)
        )
        return state, {name: row.at[i].set(metrics[name]) for name, row in rows.items()}

    return jax.lax.fori_loop(0, count, body, (state, rows))


def _run_one(
    train_step: TrainStep,
    state: TrainState,
    key: Key,
    batches: Callable,
    rows: dict[str, Array],
    count: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """Outside any loop."""
    state, metrics = train_step(state, jax.random.fold_in(key, state.step), batches(state.step))
    return state, {name: jnp.reshape(metrics[name], 1) for name in rows}


def check_finite(metrics: dict[str, np.ndarray], start: int, params: Params) -> None:
    """The losses and gradients from step `start` on are numbers; else the leaf of `params` at
    fault is named.
    """
    bad = np.flatnonzero(~np.isfinite(metrics["loss"] + metrics["grad_norm"]))
    if bad.size:
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        broken = [jax.tree_util.keystr(path) for path, x in leaves if not jnp.isfinite(x).all()]
        first = f", and params{broken[0]} is not finite since" if broken else ""
        loss, gradient = (metrics[name][bad[0]] for name in ("loss", "grad_norm"))
        raise FloatingPointError(
            f"The loss is {loss} at step {start + bad[0]}, its gradient's norm {gradient}{first}: "
            "training stopped. "
            "Lower the learning rate, clip the gradients (optax.clip_by_global_norm), or look for "
            "values that are not finite in the data."
        )
