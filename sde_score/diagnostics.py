"""Where is a score wrong? By noise level: Fisher divergence, Stein's identity, Fokker–Planck
residual.

Let e = s − ∇log p_t. Integration by parts gives E[div f + f·s] = E[f·e], which is 0 for every
field f if s is exact, and needs only draws of p_t: Stein's identity (Gorham & Mackey 2015, arXiv
1506.03039). The fields are the score itself, which sees a wrong length (for s = c ∇log p_t it
gives (c² − c) E‖∇log p_t‖²); x; and plane waves v cos(w·x/h + b), with h from the width of the
whole cloud to the width 1/rms(s) of its finest parts.

As E[f(x_t)·z | x_0] = sigma E[div f | x_0], the same mean has two forms: sigma (div f + f·s) has
little noise at small sigma, f·(sigma s + z), the denoising residual, at large sigma. Their
difference, of mean 0, is a control variate: each level's regression on it finds the best mixture.
Every example is seen with z and −z; standard errors are over the examples.

Without the truth, J(s) = E[div s + ½‖s‖²] = ½ E‖e‖² − ½ E‖∇log p_t‖² (Hyvärinen 2005) is known up
to a constant. But what the best combination g of the fields gains, 2 (J(s) − J(s − g)), is the
squared length of e's projection on them, a lower bound of E‖e‖²: mᵀ G⁻¹ m with m_k = E[f_k·e] and
G_kl = E[f_k·f_l].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, ScoreFn
from sde_score.divergence import divergence, hutchinson_divergence, rademacher_probes
from sde_score.metrics.two_sample import Estimate
from sde_score.sampling.grid import log_snr_grid
from sde_score.sde import log_snr

_BATCH = 256  # examples evaluated together
_FALSE_ALARM = 0.01  # chance that an exact score has a suspect level at all
_RIDGE = 1e-3  # on G, of unit diagonal: s and x coincide at high noise; it only lowers the bound


class Diagnosis(NamedTuple):
    """Estimates at L noise levels, from t1 to t0; squares are per coordinate, in units of the
    noise.

    `fisher`: sigma² E‖s − ∇log p_t‖²/d, None without the truth. `bound`: its lower bound, which
    noise can make negative. `objective`: sigma² E[div s + ½‖s‖²]/d, to compare scores on the same
    examples. `stein`: sigma E[div f + f·s]/d for fields of unit mean square per coordinate: s, x,
    and the waves from the longest on; `z_scores`: the same in standard errors. `gain`: the c for
    which c·s is nearest to the truth, −E[div s]/E‖s‖². `fokker_planck`: E‖residual‖²/E‖s‖², time
    in units of log-SNR. `suspect`: some |z| is above `threshold`, which happens at no level for 99
    of 100 exact scores or more (Bonferroni). Errors finer than 1/rms(s), the shortest wave, escape
    it: they show in `fokker_planck`, which is 0 for an exact score, but for rounding.
    """

    times: Float[Array, " L"]
    log_snr: Float[Array, " L"]
    fisher: Estimate | None
    bound: Estimate
    objective: Estimate
    stein: Estimate  # [L, fields], as are the z_scores
    gain: Estimate
    fokker_planck: Estimate
    z_scores: Array
    threshold: Scalar
    suspect: Bool[Array, " L"]


def diagnose(
    key: Key,
    score_fn: ScoreFn,
    sde: SDE,
    x: Float[Array, "n *event"],
    *,
    ts: Float[Array, " L"] | None = None,
    true_score: ScoreFn | None = None,
    num_waves: int = 6,
    num_probes: int | None = None,
) -> Diagnosis:
    """Examine a score at the times `ts` (16, uniform in log-SNR, by default) on held-out examples
    `x`: not those of its training, and some hundreds or more, as errors are taken for normal.

    Traces are exact, d Jacobian products each, or estimated by `num_probes` ≥ 2 random signs. A
    trained score is suspect once n is large enough; `gain` and `bound` say how wrong it is.
    """
    _checks.check_key(key)
    _checks.check_sde(sde)
    _checks.check_data("x", x)
    _checks.check_count("len(x)", jnp.shape(x)[0] if jnp.ndim(x) else 0, 10)
    _checks.check_count("num_waves", num_waves)
    if num_probes is not None:
        _checks.check_count("num_probes", num_probes, 2)
    x = _checks.at_least_float32(x)
    ts = log_snr_grid(sde, 15) if ts is None else ts
    _checks.check_grid(ts, sde)
    ts = jnp.asarray(ts, x.dtype)
    wave_key, level_key = jax.random.split(key)
    observe = partial(_observe, score_fn, true_score or score_fn, sde, num_probes)
    examine = partial(_examine, observe, sde, x, _draw_waves(wave_key, num_waves, x[0]))
    keys = jax.random.split(level_key, len(ts))
    levels = jax.lax.map(lambda level: examine(*level), (keys, ts))
    if true_score is None:
        levels["fisher"] = None
    z = jnp.abs(levels["z_scores"])
    threshold = norm.isf(jnp.asarray(0.5 * _FALSE_ALARM / z.size, x.dtype))
    suspect = ~jnp.all(z <= threshold, axis=1)  # as nan is
    log_snrs = jax.vmap(partial(log_snr, sde))(ts)
    return Diagnosis(times=ts, log_snr=log_snrs, threshold=threshold, suspect=suspect, **levels)


def fokker_planck_residual(
    score_fn: ScoreFn,
    sde: SDE,
    x: Float[Array, "*event"],
    t: Scalar,
    *,
    probes: Float[Array, "k *event"] | None = None,
) -> Float[Array, "*event"]:
    """∂_t s − ∇[½ g² (div s + ‖s‖²) − f·s], with the exact trace or the probes' mean (Lai et al.
    2023, arXiv 2210.04296, sec. 3).

    0 for s = ∇log p_t: the gradient of ∂_t log p = ½ g² (Δlog p + ‖∇log p‖²) − f·∇log p − div f,
    where div f is the same for all x. And 0 for the scores of a wrong p_0: it only compares times.
    """
    _checks.check_floating("x", x)
    _checks.check_scalar_time(t, sde)
    x = _checks.at_least_float32(x)
    return jnp.mean(_residuals(score_fn, sde, x, jnp.asarray(t, x.dtype), probes), axis=0)


def summarize_diagnosis(diagnosis: Diagnosis) -> str:
    """A line for each run of adjacent suspect levels: where, how surely, and how far off."""
    times, threshold = np.asarray(diagnosis.times), float(diagnosis.threshold)
    worst = np.nan_to_num(np.max(np.abs(diagnosis.z_scores), axis=1), nan=np.inf)
    edges = np.flatnonzero(np.diff(np.pad(np.asarray(diagnosis.suspect, int), 1)))
    lines = [f"No level is suspect: every field within {threshold:.1f} standard errors of 0."]
    for first, stop in edges.reshape(-1, 2):
        i = first + np.argmax(worst[first:stop])
        gain, stderr = (float(part[i]) for part in diagnosis.gain)
        lines.append(
            f"t in [{times[stop - 1]:.2g}, {times[first]:.2g}]: off by {worst[i]:.1f} standard "
            f"errors at t = {times[i]:.2g}, where {gain:.3f} ± {stderr:.3f} times the score is "
            "nearest to the truth."
        )
    residual = np.nan_to_num(diagnosis.fokker_planck.value, nan=np.inf)
    i = np.argmax(residual)
    lines.append(
        f"Fokker–Planck residual: at most {residual[i]:.2g} of E‖s‖², at t = {times[i]:.2g}; 0 "
        "for a score that fits its own time, whatever its p_0."
    )
    return "\n".join(lines[1:] if len(lines) > 2 else lines)


def _traces(score_fn: ScoreFn, x: Array, t: Scalar, probes: Array | None) -> tuple[Array, Array]:
    """The score and [k] traces: the exact one, or each probe's."""
    field = lambda x: _checks.call(score_fn, x, t)  # noqa: E731
    if probes is not None:
        return hutchinson_divergence(field, x, probes)
    score, trace = divergence(field, x)
    return score, trace[None]


def _residuals(
    score_fn: ScoreFn, sde: SDE, x: Array, t: Array, probes: Array | None
) -> Float[Array, "k *event"]:
    def rate(x: Array) -> Float[Array, " k"]:
        score, traces = _traces(score_fn, x, t, probes)
        transport = jnp.sum(sde.drift(x, t) * score)
        return 0.5 * sde.diffusion(t) ** 2 * (traces + jnp.sum(score**2)) - transport

    change = jax.jvp(lambda t: _checks.call(score_fn, x, t), (t,), (jnp.ones_like(t),))[1]
    return change[None] - jax.jacrev(rate)(x)


def _mean_square(residuals: Float[Array, "k *event"]) -> Scalar:
    """‖E r‖² from independent estimates r, without their variance; ‖r‖² from one."""
    k, square = len(residuals), jnp.sum(jnp.sum(residuals, axis=0) ** 2)
    return square if k == 1 else (square - jnp.sum(residuals**2)) / (k * (k - 1))


def _draw_waves(key: Key, num: int, x: Array) -> tuple[Array, ...]:
    """Unit vectors w [num, d], v of length √(2d), phases b [num]; places in [0, 1] of ln h."""
    w_key, v_key, b_key = jax.random.split(key, 3)
    draw = lambda key: jax.random.normal(key, (num, x.size), x.dtype)  # noqa: E731
    unit = lambda a: a / jnp.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    phases = jax.random.uniform(b_key, (num,), x.dtype, 0.0, 2.0 * jnp.pi)
    places = jnp.linspace(0.0, 1.0, num, dtype=x.dtype)
    return unit(draw(w_key)), np.sqrt(2 * x.size) * unit(draw(v_key)), phases, places


def _observe(
    score_fn: ScoreFn,
    true_score: ScoreFn,
    sde: SDE,
    num_probes: int | None,
    t: Array,
    key: Key,
    x0: Array,
) -> tuple[Array, ...]:
    """x_t, z, s [2, d], and their trace, ‖residual‖² and ‖e‖² [2], with z and with −z."""
    noise_key, probe_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    probes = None if num_probes is None else rademacher_probes(probe_key, num_probes, x0.shape)

    def at(noise: Array) -> tuple[Array, ...]:
        x_t = sde.alpha(t) * x0 + sde.sigma(t) * noise
        score, traces = _traces(score_fn, x_t, t, probes)
        error = score - _checks.call(true_score, x_t, t, name="true_score")
        squares = _mean_square(_residuals(score_fn, sde, x_t, t, probes)), jnp.sum(error**2)
        return (*map(jnp.ravel, (x_t, noise, score)), jnp.mean(traces), *squares)

    return jax.vmap(at)(jnp.stack([noise, -noise]))


def _examine(
    observe: partial, sde: SDE, x: Array, waves: tuple[Array, ...], key: Key, t: Array
) -> dict[str, Any]:
    """The estimates at one time."""
    n, d, alpha, sigma = len(x), x[0].size, sde.alpha(t), sde.sigma(t)
    each = lambda fn, xs: jax.lax.map(lambda x: fn(*x), xs, batch_size=min(n, _BATCH))  # noqa: E731
    draws = each(partial(observe, t), (jax.random.split(key, n), x))
    energy = jnp.mean(draws[2] ** 2, axis=(1, 2))
    traces, residual, error = (jnp.mean(part, axis=1) / d for part in draws[3:])
    width = jnp.sqrt(alpha**2 * jnp.mean(jnp.var(x, axis=0)) + sigma**2)
    rms = jnp.maximum(jnp.sqrt(jnp.mean(energy)), 1.0 / width)  # no exact score is shorter
    scales = width, rms, sigma
    # Each example's centre is the mean of the others: its own part would bias the field x.
    centres = alpha * ((jnp.sum(x, axis=0, keepdims=True) - x) / (n - 1)).reshape(n, d)
    both = lambda centre, *draw: jax.vmap(partial(_moments, waves, scales, centre))(*draw)  # noqa: E731
    operator, control, gram = (
        jnp.mean(part, axis=1) for part in each(both, (centres, *draws[:4]))
    )
    values = _without_control(operator, control)
    stein, centred = _estimate(values), values - jnp.mean(values, axis=0, keepdims=True)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / (n * (n - 1))
    rounding = 4.0 * jnp.finfo(x.dtype).eps * jnp.sqrt(jnp.mean(operator**2, axis=0))
    stderr = jnp.hypot(stein.stderr, rounding)  # at large sigma the control leaves nothing else
    inverse = jnp.linalg.inv(jnp.mean(gram, axis=0) + _RIDGE * jnp.eye(len(gram[0])))
    slopes = jnp.matmul(inverse, stein.value, precision="highest")
    bound = jnp.sum(slopes * stein.value) - jnp.sum(inverse * covariance)  # less the noise's part
    square = jnp.sum(gram * (slopes[:, None] * slopes[None])[None], axis=(1, 2))
    ascent = _estimate(2.0 * jnp.sum(values * slopes[None], axis=1) - square)  # linearised
    length = sigma * jnp.mean(energy) / rms
    off = stein.value[0] / length  # 1 − c
    ratio = _estimate(values[:, 0] - off * sigma * energy / rms)  # as well
    pace = (sigma / sde.diffusion(t)) ** 2  # dt by dlog_snr
    return {
        "fisher": _estimate(sigma**2 * error),
        "bound": Estimate(bound, ascent.stderr),
        "objective": _estimate(sigma**2 * (traces + 0.5 * energy)),
        "stein": stein,
        "z_scores": stein.value / jnp.where(stein.value == 0, 1, stderr),  # of s = 0: 0/0
        "gain": Estimate(1.0 - off, ratio.stderr / length),
        "fokker_planck": _estimate(pace**2 * residual / jnp.mean(energy)),
    }


def _moments(
    waves: tuple[Array, ...],
    scales: tuple[Array, ...],
    centre: Array,
    x_t: Array,
    noise: Array,
    score: Array,
    trace: Array,
) -> tuple[Array, Array, Array]:
    """sigma (div f + f·s)/d and its control variate [fields], f·f'/d [fields, fields], at a
    point.
    """
    (w, v, phases, places), (width, rms, sigma) = waves, scales
    away, frequencies = x_t - centre, width ** (places - 1.0) * rms**places  # from 1/width to rms
    angles = frequencies * jnp.sum(w * away[None], axis=1) + phases
    firsts, last = jnp.stack([score / rms, away / width]), v * jnp.cos(angles)[:, None]
    f = jnp.concatenate([firsts, last])
    slopes = -frequencies * jnp.sum(v * w, axis=1) * jnp.sin(angles)
    div = jnp.concatenate([jnp.stack([trace / rms, x_t.size / width]), slopes])
    operator = sigma * (div + jnp.sum(f * score[None], axis=1)) / x_t.size
    control = (jnp.sum(f * noise[None], axis=1) - sigma * div) / x_t.size
    return operator, control, jnp.mean(f[:, None] * f[None], axis=-1)


def _without_control(values: Array, control: Array) -> Float[Array, "n fields"]:
    """`values` less their regression on a control of mean 0, column by column."""
    swing = control - jnp.mean(control, axis=0, keepdims=True)
    variance = jnp.maximum(jnp.sum(swing**2, axis=0), jnp.finfo(values.dtype).tiny)
    return values - (jnp.sum(values * swing, axis=0) / variance)[None] * control


def _estimate(values: Float[Array, "n *rest"]) -> Estimate:
    return Estimate(jnp.mean(values, 0), jnp.std(values, 0, ddof=1) / np.sqrt(len(values)))
