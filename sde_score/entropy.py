"""The gradient of an entropy from a score alone: variational inference with any sampler.

A sampler z = g_θ(ε), ε ~ noise, has a law q_θ whose density need not be known. As E[∇_θ log q_θ] =
0, its entropy H = −E log q_θ(z) obeys

    ∇_θ H = −E[(∂g_θ/∂θ)ᵀ ∇log q_θ(z)]

(Li & Turner 2018, arXiv 1705.07107, sec. 2; Song et al. 2019, arXiv 1905.07088, sec. 5.2): it
needs the score of q_θ, which sliced score matching learns from samples.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import Key, Params, Scalar, ScoreFn
from sde_score.training.state import TrainState, make_train_step

CoupledLoss: TypeAlias = Callable[[Params, Params, Key, object], Scalar]
"""`(own params, the other's params, key, batch) -> []`."""


def entropy_surrogate(
    score_fn: ScoreFn,
    sampler: Callable[[Float[Array, "*noise"]], Float[Array, "*latent"]],
    noise: Float[Array, "*noise"],
) -> Scalar:
    """−⟨stop_gradient(s(z)), z⟩ at z = sampler(noise), whose mean has the gradient of the entropy
    of z, in nats, with respect to what the sampler closes over.

    Only the gradient counts: the mean itself is the dimension of z, whatever the law, where `s` is
    exact (Stein's identity). `score_fn` z ↦ s(z) may be exact, learnt by `sliced_score_matching`
    on samples, or `stein_score(samples)`; no gradient flows into it. Of an encoder q(z | x) close
    over x in both. Independent draws of `noise` and of the score's samples leave the estimate
    biased only by the score's error, −E[(∂g/∂θ)ᵀ (s − ∇log q)]. Of the laws without a density,
    and so without an entropy, only a z without any noise is found: one on a line or on a few
    points is not.
    """
    fix = "Draw it with jax.random.normal(key, shape)."
    if not eqx.is_array_like(noise):
        raise _checks.ArgumentError(f"`noise` must be an array; got {type(noise).__name__}. {fix}")
    _checks.check_data("noise", noise, fix)
    noise = _checks.at_least_float32(noise)
    z = _sample(sampler, noise)
    rule = (
        f"`score_fn` must take the latent z = sampler(noise), of shape {z.shape}, and return as "
        "much"
    )
    score = _call(score_fn, jax.lax.stop_gradient(z), rule, "Give its network the latent's size.")
    if score.shape != z.shape:
        raise _checks.ArgumentError(
            f"{rule}; it returned shape {score.shape}. Give its network the latent's size."
        )
    rule = "`score_fn(z)` must be finite: the score network has diverged. Lower its learning rate."
    return -jnp.sum(jax.lax.stop_gradient(_finite(score, rule)).astype(z.dtype) * z)


class AlternatingState(NamedTuple):
    """Of a model and of the score of what it samples; `init_train_state` makes each."""

    model: TrainState
    score: TrainState


def make_alternating_step(
    model_loss: CoupledLoss,
    score_loss: CoupledLoss,
    model_optimizer: optax.GradientTransformation,
    score_optimizer: optax.GradientTransformation,
    *,
    score_steps: int = 1,
    ema_decay: float = 0.999,
) -> Callable[[AlternatingState, Key, object], tuple[AlternatingState, dict[str, Array]]]:
    """The pure function (state, key, batch) -> (state, metrics): `score_steps` steps down
    score_loss(score_params, model_params, key, batch), then one down model_loss(model_params,
    score_params, key, batch) (Song et al. 2019, app. D).

    The metrics are those of `make_train_step` under "model_" and, of the last score step, under
    "score_". Either loss sees the other's parameters as constants.
    """
    _checks.check_count("score_steps", score_steps)
    for name, loss in (("model_loss", model_loss), ("score_loss", score_loss)):
        if not callable(loss):
            raise _checks.ArgumentError(
                f"`{name}` must be a function (own params, the other's params, key, batch) -> []; "
                f"got {_checks.describe(loss)}."
            )
    unpack = lambda loss: lambda params, key, pair: loss(params, pair[0], key, pair[1])  # noqa: E731
    model_step = make_train_step(unpack(model_loss), model_optimizer, ema_decay=ema_decay)
    score_step = make_train_step(unpack(score_loss), score_optimizer, ema_decay=ema_decay)

    def step(
        state: AlternatingState, key: Key, batch: object
    ) -> tuple[AlternatingState, dict[str, Array]]:
        _checks.check_key(key)
        if not (
            isinstance(state, AlternatingState)
            and all(isinstance(part, TrainState) for part in state)
        ):
            raise _checks.ArgumentError(
                "`state` must be AlternatingState(model, score) of two training states; got "
                f"{type(state).__name__}. Make each by init_train_state."
            )
        model_key, score_key = jax.random.split(key)

        def learn(score: TrainState, i: Array) -> tuple[TrainState, dict[str, Array]]:
            key = jax.random.fold_in(score_key, i)
            return score_step(score, key, (state.model.params, batch))

        score, rows = jax.lax.scan(learn, state.score, jnp.arange(score_steps))
        model, metrics = model_step(state.model, model_key, (score.params, batch))
        named = {f"model_{name}": value for name, value in metrics.items()}
        named |= {f"score_{name}": row[-1] for name, row in rows.items()}
        return AlternatingState(model, score), named

    return step


def _sample(sampler: Callable, noise: Array) -> Array:
    """z, whose law may have a density: it depends on the noise, of dimensions enough."""
    rule = f"`sampler` must take `noise`, of shape {noise.shape}, and return z, a floating array"
    z = _call(sampler, noise, rule, "Close over all else that it needs.")
    if z.size > noise.size:
        raise _checks.ArgumentError(
            f"`noise` must have at least as many numbers as z = sampler(noise), {z.size}; "
            f"got {noise.size}. The law of z has no density otherwise, and no entropy."
        )
    try:  # what depends on the noise cannot leave vmap without an axis
        jax.eval_shape(jax.vmap(sampler, out_axes=None), noise[None])
    except (ValueError, jax.errors.JAXTypeError):  # the latter where it looks at its values
        rule = "`sampler(noise)` must be finite. Lower the learning rate or clip the gradients."
        return _finite(z, rule)
    raise _checks.ArgumentError(
        "`sampler` must depend on `noise`: without noise z is a point, which has no density "
        "and no entropy gradient. Feed the noise to the encoder."
    )


def _call(fn: Callable, x: Array, rule: str, fix: str) -> Array:
    """fn(x), one floating array; whatever else comes of it is told in one line."""
    try:
        out = fn(x)
    except jax.errors.KeyReuseError:
        raise
    except Exception as error:  # whatever error the network's framework has
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise _checks.ArgumentError(
            f"{rule}; it failed by {type(error).__name__}: {reason}. {fix}"
        ) from error
    if not (eqx.is_array_like(out) and jnp.issubdtype(jnp.result_type(out), jnp.floating)):
        got = getattr(out, "dtype", type(out).__name__)
        raise _checks.ArgumentError(f"{rule}; it returned {got}. {fix}")
    return jnp.asarray(out)


def _finite(x: Array, rule: str) -> Array:
    """x, or an error; inside a trace, when it runs."""
    if _checks.is_concrete(x) and not np.all(np.isfinite(np.asarray(x))):
        raise _checks.ArgumentError(rule)
    return eqx.error_if(x, ~jnp.all(jnp.isfinite(x)), rule)
