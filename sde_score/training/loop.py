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
    run = jax.jit(
        partial(_run_one if steps_per_dispatch == 1 else _run_chunk, train_step), donate_argnums=0
    )
    batches = travelling(batches)
    losses = np.empty(num_steps, np.float32)
    chunk = np.zeros(steps_per_dispatch, np.float32)

    def settle(start: int, stop: int, chunk_losses: Array) -> None:
        losses[start:stop] = np.asarray(chunk_losses)[: stop - start]
        _check_finite(losses, start, stop)
        if report is not None:
            report(start, stop, num_steps, float(losses[start:stop].mean()))

    pending = []  # losses are read one dispatch late, so that the device never waits
    for start in range(0, num_steps, steps_per_dispatch):
        stop = min(start + steps_per_dispatch, num_steps)
        state, chunk_losses = run(state, key, batches, chunk, stop - start)
        pending.append((start, stop, chunk_losses))
        if len(pending) == 2:
            settle(*pending.pop(0))
    settle(*pending.pop())
    return state, losses


def _run_chunk(
    train_step: TrainStep,
    state: TrainState,
    key: Key,
    batches: Callable,
    losses: Array,
    count: Array,
) -> tuple[TrainState, Array]:
    """`count` steps in a loop; their losses lie in the front of `losses`. A count that is traced:
    one compilation.
    """

    def body(i: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, losses = carry
        state, metrics = train_step(
            state, jax.random.fold_in(key, state.step), batches(state.step)
        )
        return state, losses.at[i].set(metrics["loss"].astype(losses.dtype))

    return jax.lax.fori_loop(0, count, body, (state, losses))


def _run_one(
    train_step: TrainStep,
    state: TrainState,
    key: Key,
    batches: Callable,
    losses: Array,
    count: Array,
) -> tuple[TrainState, Array]:
    """One step outside any loop."""
    state, metrics = train_step(state, jax.random.fold_in(key, state.step), batches(state.step))
    return state, jnp.reshape(metrics["loss"], 1)


def _check_finite(losses: np.ndarray, start: int, stop: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses[start:stop]))
    if bad.size:
        raise FloatingPointError(
            f"The loss is {losses[start + bad[0]]} at step {start + bad[0]}: training stopped. "
            "Lower the learning rate, "
            "clip the gradients (optax.clip_by_global_norm), or look for values that are not "
            "finite in the data."
        )
