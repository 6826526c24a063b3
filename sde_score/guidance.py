"""Controllable generation: a score in, a guided score out; a `Step` in, one out that keeps what is
observed.

As log p_t(x | y) = log p_t(x) + log p_t(y | x) + const, guidance adds ∇ log p_t(y | x) (Song et
al. 2021, arXiv 2011.13456, eq. 14), and is exact where that likelihood is. Inpainting and
colourisation noise the observation to each time's level apart from the rest, and so are not: by
how much inpainting is off, `benchmarks/bench_guidance.py` measures.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn, Step, bind
from sde_score.losses.times import Times, uniform_times
from sde_score.operators import check_mask
from sde_score.parameterization import denoise
from sde_score.sampling.grid import Finish
from sde_score.sampling.steps import transition
from sde_score.sde import perturb

Event = Float[Array, "*event"]

_OBSERVATION = 1_618_033_988  # folded into the key: the step takes the key itself


def add_guidance(score_fn: ScoreFn, log_likelihood_fn: Callable) -> Partial:
    """The score s(x, t) + ∇_x log_likelihood_fn(x, t), of a function that is log p_t(y | x) up to
    a constant: one forward and one backward pass of it more.
    """
    return bind(_guided, score_fn, log_likelihood_fn)


def classifier_guidance(
    score_fn: ScoreFn, logits_fn: Callable, label: Scalar, *, scale: Scalar = 1.0
) -> Partial:
    """s(x, t) + scale ∇_x log p_t(label | x), by a classifier's logits_fn(x, t) -> [num_classes]
    of noised data, such as `nets.Classifier` under `classifier_loss` (Dhariwal & Nichol 2021,
    arXiv 2105.05233, alg. 1).
    """
    _check_scale(scale)
    return add_guidance(score_fn, bind(_log_class, logits_fn, label, scale))


def classifier_loss(
    key: Key,
    logits_fn: Callable,
    sde: SDE,
    x0: Float[Array, "B *event"],
    labels: Int[Array, " B"],
    *,
    times: Times = uniform_times,
) -> Scalar:
    """The mean of −log p_t(label | x_t), in nats, of a batch at noised points."""
    _checks.check_key(key)
    _checks.check_data("x0", x0)
    fix = "Give one whole number for each example."
    _checks.check_shape("labels", jnp.shape(labels), jnp.shape(x0)[:1], fix)
    time_key, noise_key = jax.random.split(key)

    def loss(key: Key, x0: Array, label: Array, t: Scalar) -> Scalar:
        return -_log_class(logits_fn, label, 1.0, perturb(key, sde, x0, t)[0], t)

    t, weight = times(time_key, sde, len(x0))
    _check_labels("labels", labels, jax.eval_shape(logits_fn, x0[0], t[0]).size)
    keys = jax.random.split(noise_key, len(x0))
    return jnp.mean(weight * jax.vmap(loss)(keys, x0, jnp.asarray(labels), t))


def condition(score_fn: Callable, context: Any) -> Partial:
    """The score (x, t) ↦ score_fn(x, t, context) of a conditional model, whose context (a label,
    a vector, any pytree) it was given in training through the loss's `context`.
    """
    return bind(_conditioned, score_fn, context)


def classifier_free(
    score_fn: Callable,
    context: Any,
    null: Any,
    scale: Scalar,
    *,
    interval: tuple[Scalar, Scalar] | None = None,
) -> Partial:
    """(1 − w) s(x, t, null) + w s(x, t, context) with w = scale, in one evaluation of twice the
    batch (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, whose w is ours less 1). The weights 0 and
    1 are exact; a network's matrix products may round otherwise in a batch of two.

    `null` is the context that stood for none in training. Outside `interval`, (low, high) in
    time, w is 1 (Kynkäänniemi et al. 2024, arXiv 2404.07724; see `time_of_log_snr`).
    """
    _check_scale(scale)
    want, got = (jax.tree.map(jnp.shape, tree) for tree in (context, null))
    if want != got:
        raise _checks.ArgumentError(
            f"`null` must have the shapes of `context`, {want}; got {got}. It is what stood for "
            "none in training."
        )
    ends = (-jnp.inf, jnp.inf) if interval is None else interval
    pair = isinstance(ends, tuple | list) and len(ends) == 2
    if not pair or _checks.is_concrete(ends) and not ends[0] < ends[1]:
        raise _checks.ArgumentError(f"`interval` must be (low, high), two times; got {interval}.")
    return bind(_classifier_free, score_fn, context, null, (scale, *ends))


def inpaint(
    step: Step, observed: Event, mask: Bool[Array, "*event"], *, num_resamples: int = 1
) -> Partial:
    """The `Step` that takes `step`, then sets x_s where `mask` is true to a draw of p(x_s | x_0 =
    observed) (Song et al. 2021, app. I.2); at t0 to `observed` itself. What `sample` does in the
    end by default, denoising, would undo that: pass it finish=keep_observed(step), or None where
    the grid ends at t0.

    With more resamples it returns to t by the forward process and comes down again (RePaint;
    Lugmayr et al. 2022, arXiv 2201.09865, alg. 1), at as many times the evaluations.
    """
    _checks.check_data("observed", observed, _checks.CONVERT)
    check_mask(mask)
    _checks.check_shape("mask", jnp.shape(mask), jnp.shape(observed), "It is that of `observed`.")
    observed, mask = jnp.asarray(observed), jnp.asarray(mask)
    keep = bind(_keep_pixels, observed, mask)
    # Of an empty mask nothing at all, as a compiler may round the same step otherwise beside more.
    empty = _checks.is_concrete(mask) and not np.any(mask)
    return _keeping(step, None if empty else keep, num_resamples, jnp.any(mask))


def colourise(step: Step, grey: Float[Array, "*pixels"], *, num_resamples: int = 1) -> Partial:
    """`inpaint` along the grey axis (1, 1, 1)/√3 of an orthonormal basis of the three channels,
    x's last axis, whose mean is `grey` (Song et al. 2021, app. I.3): exact up to rounding.

    In such a basis x_s moves by (alpha grey + sigma z/√3 − its mean) in each channel, whatever the
    other two axes.
    """
    _checks.check_data("grey", grey, _checks.CONVERT)
    return _keeping(step, bind(_keep_grey, jnp.asarray(grey)), num_resamples, jnp.array(True))


def keep_observed(step: Partial, *, finish: Finish = denoise) -> Partial:
    """`finish`, with what `step`, made by `inpaint` or `colourise`, keeps put back after it."""
    if getattr(step, "func", None) is not _kept:
        raise _checks.ArgumentError(
            f"`step` must be one that inpaint or colourise made; got {_checks.describe(step)}."
        )
    keep = step.args[1]
    return bind(finish) if keep is None else bind(_finished, finish, keep)


def _guided(score_fn: ScoreFn, log_likelihood_fn: Callable, x: Event, t: Scalar) -> Event:
    value = lambda x: _checks.check_scalar("log_likelihood_fn", log_likelihood_fn(x, t), "(x, t)")
    return _checks.call(score_fn, x, t) + jax.grad(value)(x)


def _log_class(logits_fn: Callable, label: Scalar, scale: Scalar, x: Event, t: Scalar) -> Scalar:
    logits, whole = logits_fn(x, t), jnp.issubdtype(jnp.result_type(label), jnp.integer)
    if jnp.ndim(logits) != 1 or jnp.shape(label) or not whole:
        raise _checks.ArgumentError(
            "`logits_fn` must return [num_classes] for one example, and `label` be one whole "
            f"number; got shape {jnp.shape(logits)} and {_checks.describe(label)}."
        )
    _check_labels("label", label, logits.size)
    inside = (label >= 0) & (label < logits.size)  # nan, where it is not known to be
    return jnp.where(inside, scale, jnp.nan) * jax.nn.log_softmax(logits)[label]


def _check_scale(scale: Any) -> None:
    if scale is None or isinstance(scale, str) or jnp.shape(scale):
        raise _checks.ArgumentError(
            f"`scale` must be one number; got {_checks.describe(scale)}: jax.vmap over several."
        )


def _check_labels(name: str, labels: Any, num_classes: int) -> None:
    """Where they are concrete."""
    if _checks.is_concrete(labels) and not all(0 <= k < num_classes for k in np.ravel(labels)):
        raise _checks.ArgumentError(
            f"`{name}` must be among the classes, 0 to {num_classes - 1}; got "
            f"{_checks.describe(labels)}."
        )


def _conditioned(score_fn: Callable, context: Any, x: Event, t: Scalar) -> Event:
    try:
        return _checks.call(score_fn, x, t, context)
    except _checks.ArgumentError as error:
        if not isinstance(error.__cause__, TypeError):  # of its signature
            raise
        raise _checks.ArgumentError(
            f"`score_fn` must take a context, score_fn(x, t, context): {error}\n"
            "A score that takes none goes to the sampler as it is."
        ) from error


def _classifier_free(
    score_fn: Callable, context: Any, null: Any, numbers: tuple, x: Event, t: Scalar
) -> Event:
    scale, low, high = numbers
    for alone in (null, context):  # of which a check knows the values: in a batch it does not
        if _checks.is_concrete(alone):
            jax.eval_shape(lambda x, c=alone: _conditioned(score_fn, c, x, t), x)
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), null, context)
    scores = jax.vmap(lambda context: _conditioned(score_fn, context, x, t))(pair)
    weight = jnp.where((low <= t) & (t <= high), scale, 1.0).astype(scores.dtype)
    return (1.0 - weight) * scores[0] + weight * scores[1]


def _keeping(step: Step, keep: Partial | None, num_resamples: int, some: Array) -> Partial:
    _checks.check_count("num_resamples", num_resamples)
    if not callable(step):
        raise _checks.ArgumentError(
            f"`step` must be a Step, such as ancestral; got {_checks.describe(step)}. Multistep "
            "methods keep nothing."
        )
    return bind(_kept, step, keep, jnp.arange(num_resamples - 1), some)  # a static shape


def _kept(
    step: Step, keep: Callable | None, resamples: Array, some: Array, key: Key, *place: Any
) -> Event:
    if keep is None:
        return step(key, *place)
    score_fn, sde, x_t, t, s = place
    a, v = transition(sde, t, s)
    last = s <= sde.t0 * (1.0 + 1e-6)  # a grid rounds its last time
    own_key = jax.random.fold_in(key, _OBSERVATION)

    def down(key: Key, own_key: Key, x: Event, index: Array | int) -> Event:
        x = step(key, score_fn, sde, x, t, s)
        noise = jax.random.normal(own_key, x.shape, x.dtype)
        exact = last & (index == resamples.size)  # the way up begins at the law of s
        alpha, sigma = jnp.where(exact, 1.0, sde.alpha(s)), jnp.where(exact, 0.0, sde.sigma(s))
        return keep(x, noise, alpha, sigma).astype(x_t.dtype)

    def again(x: Event, index: Array) -> tuple[Event, None]:
        up_key, key, noise_key = jax.random.split(jax.random.fold_in(own_key, index), 3)
        up = a * x + jnp.sqrt(v) * jax.random.normal(up_key, x.shape, x.dtype)
        return jnp.where(some, down(key, noise_key, up, index + 1), x), None

    first_key = jax.random.fold_in(own_key, resamples.size)
    return jax.lax.scan(again, down(key, first_key, x_t, 0), resamples)[0]


def _finished(
    finish: Finish, keep: Callable, score_fn: ScoreFn, sde: SDE, x: Event, t: Scalar
) -> Event:
    return keep(finish(score_fn, sde, x, t), jnp.zeros_like(x), 1.0, 0.0)


def _keep_pixels(
    observed: Event, mask: Array, x: Event, noise: Event, alpha: Scalar, sigma: Scalar
) -> Event:
    fix = "It is one example, as x is: jax.vmap over a batch."
    _checks.check_shape("observed", observed.shape, x.shape, fix)
    return jnp.where(mask, alpha * observed + sigma * noise, x)


def _keep_grey(grey: Array, x: Event, noise: Event, alpha: Scalar, sigma: Scalar) -> Event:
    fix = "`colourise` takes x of shape [*pixels, 3] and the mean over its channels."
    _checks.check_shape("grey", (*grey.shape, 3), x.shape, fix)
    known = alpha * grey + sigma * jnp.mean(noise, axis=-1)  # whose deviation is 1/√3
    return x + (known - jnp.mean(x, axis=-1))[..., None]
