"""The mean log-likelihood of a data set, with a confidence interval and a budget of its errors."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import stdtrit

from sde_score import _checks
from sde_score._solvers import check_rtol
from sde_score._typing import SDE, Key, Scalar, ScoreFn
from sde_score.chunks import ChunkError, Progress, map_in_chunks
from sde_score.likelihood import exact_log_likelihood, log_likelihood
from sde_score.sde import log_snr, time_of_log_snr

_NUM_COMPARED = 256  # examples whose likelihood is computed again for the budget


class ErrorBudget(NamedTuple):
    """What is known of five errors of a mean log-likelihood, in nats.

    `probes` and `dequantization` are their shares of its standard error: both nan with one probe,
    the latter also with one pass, from which they cannot be told. `tolerance` is by how much the
    mean moves with a ten times looser tolerance, hence some ten times the error; `truncation` by
    how much when sigma/alpha at t0 doubles, hence some three times the difference from the
    density without noise under VP and VE, where it falls as sigma² (more where the model is near
    the data), once under sub-VP, where it falls as sigma; both are of the first pass over the
    first 256 examples. `prior` bounds KL(p_t1 ‖ prior) ≤ ½ (alpha/sigma)² E‖x_0‖², the mean
    KL(p(x_t1 | x_0) ‖ prior); nan where another terminal density was given.
    """

    probes: float
    tolerance: float
    truncation: float
    prior: float
    dequantization: float


class DatasetLikelihood(NamedTuple):
    """The mean of log p_t0 over a data set, in nats for one example, its standard error, and the
    interval that covers it at the confidence asked for; the `log_probs` [n] behind it, the
    `budget`, and the evaluations that the slowest example took.

    The interval's width comes from the spread of the examples' estimates, and so holds their own
    variance and that of probes and dequantisation; the budget's other terms come on top.
    """

    mean: float
    stderr: float
    interval: tuple[float, float]
    log_probs: np.ndarray
    budget: ErrorBudget
    num_evals: int


def dataset_log_likelihood(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    data: Array,
    *,
    num_probes: int | None = 1,
    dequantize: Callable[[Key, Array], Array] | None = None,
    num_passes: int = 1,
    rtol: Scalar = 1e-5,
    atol: Scalar = 1e-5,
    confidence: float = 0.95,
    chunk_size: int = 256,
    progress: Progress | None = None,
    **options: Any,
) -> DatasetLikelihood:
    """`log_likelihood` of each example of `data`, [n, *event], in chunks; with num_probes=None
    `exact_log_likelihood`. The other options are theirs, but for a grid: the budget compares
    tolerances.

    Integers need `dequantize`, such as Partial(uniform_dequantize, num_levels=256, data_range=(-1,
    1)): each of `num_passes` passes over the data dequantises anew, and an example's value is the
    mean over passes. The SDE must be a dataclass. A chunk that fails raises a `ChunkError`, whose
    `finished` holds log-densities, their standard errors, evaluations and ‖x_0‖², in the order of
    passes over the data.
    """
    _checks.check_key(key)
    _checks.check_count("num_passes", num_passes)
    _checks.check_sde(sde)
    _check_data(data, dequantize)
    _check_solves(rtol, atol, jnp.result_type(float, data), options)
    noisier = _noisier(sde)
    _check_confidence(confidence)

    def one(item: tuple, data: Array, score_fn: ScoreFn, sde: SDE, tolerances: Array) -> tuple:
        example_key, index = item
        probe_key, data_key = jax.random.split(example_key)
        x0 = data[index] if dequantize is None else dequantize(data_key, data[index])
        given = options | {"rtol": tolerances[0], "atol": tolerances[1]}
        if num_probes is None:
            out = exact_log_likelihood(score_fn, sde, x0, **given)
        else:
            out = log_likelihood(probe_key, score_fn, sde, x0, num_probes=num_probes, **given)
        return out.log_prob, out.stderr, out.num_evals, jnp.sum(x0**2)

    keys, tolerances = jax.random.split(key, (num_passes, len(data))), jnp.array([rtol, atol])
    run = partial(_run, one, jnp.asarray(data), score_fn, chunk_size)
    log_probs, stderrs, num_evals, squares = run(keys, sde, tolerances, progress)
    shift = partial(_shift, run, keys[:1, :_NUM_COMPARED], log_probs[:1, :_NUM_COMPARED])
    probes, dequantization = _shares(log_probs, stderrs)
    ratio = sde.alpha(jnp.asarray(sde.t1)) / sde.sigma(jnp.asarray(sde.t1))
    known = options.get("terminal_log_prob") is None
    budget = ErrorBudget(
        probes=probes,
        tolerance=shift(sde, 10.0 * tolerances),
        truncation=shift(noisier, tolerances),
        prior=float(0.5 * ratio**2 * squares.mean()) if known else np.nan,
        dequantization=0.0 if dequantize is None else dequantization,
    )
    values = log_probs.mean(axis=0, dtype=np.float64)
    mean, stderr = float(values.mean()), float(np.std(values, ddof=1) / np.sqrt(values.size))
    interval = confidence_interval(mean, stderr, values.size, confidence=confidence)
    return DatasetLikelihood(mean, stderr, interval, values, budget, int(num_evals.max()))


def _run(
    one: Callable,
    data: Array,
    score_fn: ScoreFn,
    chunk_size: int,
    keys: Array,
    sde: SDE,
    tolerances: Array,
    progress: Progress | None,
) -> list[np.ndarray]:
    """What `one` returns, [passes, rows], for each pass over the first rows of the data."""
    passes, rows = keys.shape
    items = keys.reshape(-1), jnp.tile(jnp.arange(rows), passes)
    args = data, score_fn, sde, tolerances
    out = map_in_chunks(one, items, *args, chunk_size=chunk_size, progress=progress)
    return [np.asarray(values).reshape(passes, rows) for values in out]


def _shift(run: Callable, keys: Array, log_probs: Any, sde: SDE, tolerances: Array) -> float:
    """By how much the mean of these log_probs moves; nan where the solves fail."""
    try:
        changed = run(keys, sde, tolerances, None)[0]
    except ChunkError:
        return np.nan
    return float(abs(np.mean(changed - log_probs, dtype=np.float64)))


def _shares(log_probs: np.ndarray, stderrs: np.ndarray) -> tuple[float, float]:
    """Probes' and dequantisation's parts of the mean's standard error, from [passes, rows]."""
    within = np.mean(stderrs.astype(np.float64) ** 2)
    total = np.var(log_probs, axis=0, ddof=1).mean() if len(log_probs) > 1 else np.nan
    variances = np.array([within, total - within])
    return tuple(np.sqrt(np.maximum(variances, 0.0) / log_probs.size).tolist())


def confidence_interval(
    mean: Scalar, stderr: Scalar, num: int, *, confidence: float = 0.95
) -> tuple[Any, Any]:
    """mean ± q stderr with Student's t quantile q for a mean of `num` draws: of examples, or of a
    likelihood's probes.
    """
    _checks.check_count("num", num, 2)
    _check_confidence(confidence)
    half = stdtrit(num - 1, 0.5 + 0.5 * confidence) * np.asarray(stderr)
    return np.asarray(mean) - half, np.asarray(mean) + half


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise _checks.ArgumentError(
            f"`confidence` must lie between 0 and 1; got {confidence}. For 95 % give 0.95."
        )


def _noisier(sde: Any) -> SDE:
    """`sde` with a t0 at which sigma/alpha is twice as large."""
    if not dataclasses.is_dataclass(type(sde)):
        raise _checks.ArgumentError(
            f"`sde` must be a dataclass, for the budget to change its t0; got {sde!r}. Decorate "
            "it with dataclasses.dataclass(frozen=True)."
        )
    level = log_snr(sde, jnp.asarray(sde.t0)) - 2.0 * jnp.log(2.0)
    return dataclasses.replace(sde, t0=float(time_of_log_snr(sde, level)))


def _check_solves(rtol: Scalar, atol: Scalar, dtype: Any, options: dict[str, Any]) -> None:
    if "ts" in options:
        raise _checks.ArgumentError(
            "`ts` must not be given: the budget compares tolerances. Give `rtol` and `atol`, or "
            "map log_likelihood over the data with map_in_chunks."
        )
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        _checks.check_positive_number(name, tolerance)
    check_rtol(rtol, jnp.promote_types(dtype, jnp.float32))


def _check_data(data: Array, dequantize: Callable | None) -> None:
    if jnp.ndim(data) == 0 or len(data) < 2:
        raise _checks.ArgumentError(
            f"`data` must be an array [n, *event] of at least two examples; got shape "
            f"{jnp.shape(data)}. For one example use log_likelihood."
        )
    integers = jnp.issubdtype(jnp.result_type(data), jnp.integer)
    if integers and dequantize is None:
        raise _checks.ArgumentError(
            f"`data` are {jnp.result_type(data)}, and integers have no density. Give "
            "`dequantize`, such as Partial(uniform_dequantize, num_levels=256, data_range=(-1, "
            "1)) with the range that the model was trained on."
        )
    if not integers and dequantize is not None:
        raise _checks.ArgumentError(
            f"`data` must be integers where they are dequantised; got {jnp.result_type(data)}. "
            "Drop `dequantize`, or undo the scaling of the data."
        )
    if dequantize is not None:
        dequantize(jax.random.key(0), jnp.asarray(data))  # it checks the levels outside of a trace
    else:
        _checks.check_data("data", data)
