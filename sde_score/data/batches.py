"""Shuffled batches as a pure function of (key, step): a checkpoint needs no iterator state.

Step k holds the positions p = k batch_size + j, 0 ≤ j < batch_size, of an endless sequence of
epochs: position p is entry p mod n of the permutation of epoch p // n. So nothing is dropped, and
a batch may straddle two epochs. One entry of a permutation costs O(1): it is a generalised Feistel
network on Z_a × Z_b with a b ≥ n, walked along its cycle until it is back below n (Black & Rogaway
2002, "Ciphers with arbitrary finite domains"). At most about one entry in √n takes a second step.
"""

import math

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Int, PyTree, Shaped, UInt32

from sde_score import _checks
from sde_score._typing import Key

_ROUNDS = 16  # with 8 the orders of 5 to 12 examples are not yet uniform
_MAX_EXAMPLES = 2**30


def batches(key: Key, data: PyTree[Shaped[Array, "n ..."]], batch_size: int) -> Partial:
    """The function `step -> batch`: every epoch holds each example once, in a new order.

    `data` is a pytree whose leaves share their leading axis, such as `(images, labels)`; a batch
    is the same pytree with leaves [batch_size, ...]. `step` is an integer from 0 to 2³² − 1, maybe
    traced. The function is a pytree: it passes through `jax.jit`, and a new key never recompiles.
    """
    _checks.check_key(key)
    num = _count_examples(data)
    _checks.check_count("batch_size", batch_size)
    if batch_size > num:
        raise _checks.ArgumentError(
            f"`batch_size` must be at most the number of examples, {num}; got {batch_size}. "
            f"Use batch_size={num}."
        )
    # Its shape carries batch_size: static, and yet without a closure, which would recompile.
    lanes = jnp.arange(batch_size, dtype=jnp.uint32)
    return Partial(_batch, key, jax.tree.map(jnp.asarray, data), lanes)


def _batch(
    key: Key, data: PyTree, lanes: UInt32[Array, " batch"], step: Int[Array, ""] | int
) -> PyTree:
    if jnp.shape(step) != () or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise _checks.ArgumentError(
            f"`step` must be one integer; got {_checks.describe(step)}. Count steps in int32."
        )
    num = jax.tree.leaves(data)[0].shape[0]
    epoch, offset = _divmod_product(jnp.asarray(step).astype(jnp.uint32), lanes.size, num)
    position = offset + lanes
    is_next = (position >= num).astype(jnp.uint32)  # lanes that belong to the next epoch
    round_keys = jnp.stack([_round_keys(key, epoch), _round_keys(key, epoch + 1)])[is_next]
    index = _permute(position - is_next * num, round_keys.T, num)
    return jax.tree.map(lambda leaf: leaf[index], data)


def _round_keys(key: Key, epoch: UInt32[Array, ""]) -> UInt32[Array, " rounds"]:
    return jax.random.bits(jax.random.fold_in(key, epoch), (_ROUNDS,), jnp.uint32)


def _divmod_product(
    step: UInt32[Array, ""], factor: int, num: int
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """divmod(step · factor, num) in 32 bits, factor ≤ num ≤ 2³⁰: long division, digit by digit."""
    digit = 31 - (num - 1).bit_length()  # num 2^digit ≤ 2³¹ bounds both terms of `part`
    quotient = remainder = jnp.uint32(0)
    for shift in reversed(range(0, 32, digit)):
        part = (remainder << digit) + ((step >> shift) & (2**digit - 1)) * factor
        quotient, remainder = (quotient << digit) + part // num, part % num
    return quotient, remainder


def _permute(
    position: UInt32[Array, " batch"], round_keys: UInt32[Array, "rounds batch"], num: int
) -> UInt32[Array, " batch"]:
    """Entries of a keyed permutation of [0, num), one key to each lane."""
    a = math.isqrt(num - 1) + 1  # ⌈√num⌉
    b = -(-num // a)
    first = _feistel(position, round_keys, a, b)
    if a * b == num:
        return first
    return jax.lax.while_loop(
        lambda x: jnp.any(x >= num),
        lambda x: jnp.where(x >= num, _feistel(x, round_keys, a, b), x),
        first,
    )


def _feistel(
    x: UInt32[Array, " batch"], round_keys: UInt32[Array, "rounds batch"], a: int, b: int
) -> UInt32[Array, " batch"]:
    """A permutation of [0, a b): x = left + a right, each in turn adding a hash of the other."""
    left, right = x % a, x // a
    for i in range(0, _ROUNDS, 2):
        left = (left + _mix(right ^ round_keys[i]) % a) % a
        right = (right + _mix(left ^ round_keys[i + 1]) % b) % b
    return left + a * right


def _mix(x: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
    """MurmurHash3's finaliser (Appleby 2011): an input bit flips each output bit half the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _count_examples(data: PyTree) -> int:
    """The length of the leading axis that all leaves share."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise _checks.ArgumentError(
            "The leaves of `data` must be arrays that share their leading axis, the examples; "
            f"got shapes {shapes}. Stack or cut them to one length."
        )
    num = shapes[0][0]
    if not 1 <= num <= _MAX_EXAMPLES:
        raise _checks.ArgumentError(
            f"`data` must have from 1 to 2³⁰ examples; got {num}. Stream what is larger."
        )
    for leaf in jax.tree.leaves(data):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            _checks.check_data("data", leaf)
    return num
