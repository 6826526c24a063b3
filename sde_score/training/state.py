"""The training state and one training step, for any loss, any pytree of parameters and any optax
optimiser.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from sde_score import _checks
from sde_score._typing import Key, Params, Scalar

LossFn: TypeAlias = Callable[[Params, Key, Any], Scalar]  # (params, key, batch)
TrainStep: TypeAlias = Callable[["TrainState", Key, Any], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """Steps taken, parameters, their exponential moving average and the optimiser's state."""

    step: Array
    params: Params
    ema_params: Params
    opt_state: Any


def init_train_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, with copies of the parameters: a donated state never takes the caller's arrays with
    it.
    """
    if not jax.tree.leaves(params):
        raise _checks.ArgumentError(
            "`params` must have at least one array. Initialise the network first."
        )
    # A weak type (that of jnp.array(1.0)) would become strong in the first step: a recompilation.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), params)
    ema_params = jax.tree.map(_float32_copy, params)
    opt_state = jax.tree.map(
        jnp.copy, optimizer.init(params)
    )  # some hold the parameters themselves
    state = TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state)
    return jax.tree.map(partial(_placed, _mesh_of(params)), state)


def _mesh_of(params: Params) -> Any:
    """The mesh that the parameters were put on, if they were."""
    leaf = jax.tree.leaves(params)[0]
    if not _checks.is_concrete(leaf) or not isinstance(leaf.sharding, NamedSharding):
        return None
    return leaf.sharding.mesh


def _placed(mesh: Any, leaf: Array) -> Array:
    """On the mesh, as the first step would leave it: else the second step compiled again."""
    if mesh is None or leaf.committed:
        return leaf
    return jax.device_put(np.asarray(leaf), NamedSharding(mesh, PartitionSpec()))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.999,
    num_parts: int = 1,
) -> TrainStep:
    """The pure function (state, key, batch) -> (state, {"loss", "grad_norm"}) that descends
    loss_fn(params, key, batch).

    The average decays by min(ema_decay, (1 + step)/(10 + step)), so that it forgets the initial
    parameters early on. With `num_parts` above 1 the gradient of a batch is the mean over so many
    parts of it, one at a time in memory, part i, its rows i, i + num_parts, …, with the key
    fold_in(key, i).
    """
    _checks.check_count("num_parts", num_parts)
    _checks.check_positive("ema_decay", ema_decay, zero=True)
    if ema_decay >= 1:
        raise _checks.ArgumentError(
            f"`ema_decay` must be below 1; got {ema_decay}. 0 turns averaging off."
        )

    def train_step(state: TrainState, key: Key, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        loss, grads = _value_and_grad(loss_fn, state.params, key, batch, num_parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(
            lambda ema, p: ema + (1.0 - decay) * (p - ema), state.ema_params, params
        )
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def _value_and_grad(
    loss_fn: LossFn, params: Params, key: Key, batch: Any, num_parts: int
) -> tuple[Scalar, Params]:
    value_and_grad = jax.value_and_grad(_scalar_loss)
    if num_parts == 1:
        return value_and_grad(params, loss_fn, key, batch)
    for leaf in jax.tree.leaves(batch):
        if len(leaf) % num_parts:
            raise _checks.ArgumentError(
                f"`num_parts` must divide the batch; got {num_parts} for {len(leaf)} examples."
            )
    # Of every num_parts-th row: each part of a batch that is cut over devices is cut as well.
    part = lambda x: jnp.swapaxes(x.reshape(-1, num_parts, *x.shape[1:]), 0, 1)  # noqa: E731
    parts = jax.tree.map(part, batch)
    first = lambda part: value_and_grad(params, loss_fn, key, part)  # noqa: E731
    shapes = jax.eval_shape(first, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

    def add(total: Any, item: tuple) -> tuple[Any, None]:
        i, part = item
        new = value_and_grad(params, loss_fn, jax.random.fold_in(key, i), part)
        return jax.tree.map(jnp.add, total, new), None

    total, _ = jax.lax.scan(add, zero, (jnp.arange(num_parts), parts))
    return jax.tree.map(lambda x: x / num_parts, total)


def _scalar_loss(params: Params, loss_fn: LossFn, key: Key, batch: Any) -> Scalar:
    return _checks.check_scalar("loss_fn", loss_fn(params, key, batch), "(params, key, batch)")


def _float32_copy(leaf: Array) -> Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return (
        leaf.astype(jnp.float32) if narrow else jnp.copy(leaf)
    )  # a bfloat16 average would never move
