"""The oracle: Gaussian mixtures, whose marginals, scores and posterior means are closed forms
under every linear SDE.

If p_0 = Σ_k w_k N(m_k, C_k), then p_t = Σ_k w_k N(alpha m_k, alpha² C_k + sigma² I). With C_k = Q
Λ Qᵀ decomposed once, each p_t costs no further decomposition: alpha² C_k + sigma² I = Q (alpha² Λ
+ sigma²) Qᵀ.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sde_score import _checks
from sde_score._typing import SDE, Key, Scalar, bind
from sde_score.losses.denoising import denoising_score_matching
from sde_score.losses.times import Times, Weight, noise_weight, uniform_times
from sde_score.metrics.two_sample import Estimate
from sde_score.operators import check_linear

_einsum = lambda spec, *arrays: jnp.einsum(spec, *arrays, precision=jax.lax.Precision.HIGHEST)  # noqa: E731


class Spectrum(NamedTuple):
    """Eigenvalues [k, d] and eigenvectors [k, d, d] (in columns) of the covariances."""

    values: Array
    vectors: Array


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x) = Σ_k weights_k N(x; means_k, covariances_k) in d dimensions; weights [k], means [k,
    d], covariances [k, d, d].
    """

    weights: Float[Array, " k"]
    means: Float[Array, "k d"]
    covariances: Float[Array, "k d d"]
    spectrum: Spectrum = dataclasses.field(init=False, repr=False)  # always the covariances' own

    def __post_init__(self) -> None:
        arrays = [
            jnp.asarray(field, float) for field in (self.weights, self.means, self.covariances)
        ]
        _check_mixture(*arrays)
        self._set(*arrays, _decompose(self.covariances, arrays[2]))

    def _set(self, *values: Any) -> None:
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self.weights, self.means, self.covariances, self.spectrum), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable) -> Self:
        """No checks and no decomposition: the leaves may be tracers, or anything else."""
        gmm = object.__new__(cls)
        gmm._set(*children)
        return gmm

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Float[Array, " d"]:
        """E[x]."""
        return _einsum("k,kd->d", self.weights, self.means)

    @property
    def covariance(self) -> Float[Array, "d d"]:
        """E[(x − E x)(x − E x)ᵀ]."""
        centred = self.means - self.mean[None]
        return _einsum(
            "k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :]
        )

    def sample(self, key: Key) -> Float[Array, " d"]:
        """One draw."""
        _checks.check_key(key)
        component_key, noise_key = jax.random.split(key)
        k = jax.random.categorical(component_key, jnp.log(self.weights))
        noise = jax.random.normal(noise_key, (self.dim,), self.means.dtype)
        values, vectors = self.spectrum
        return self.means[k] + _einsum("ij,j->i", vectors[k], jnp.sqrt(values[k]) * noise)

    def log_prob(self, x: Float[Array, " d"]) -> Scalar:
        """log p(x), in nats."""
        return jax.nn.logsumexp(self._log_joint(self._whiten(x)))

    def responsibilities(self, x: Float[Array, " d"]) -> Float[Array, " k"]:
        """p(component | x)."""
        return jax.nn.softmax(self._log_joint(self._whiten(x)))

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """∇ log p(x) = −Σ_k p(k | x) C_k⁻¹ (x − m_k)."""
        whitened = self._whiten(x)
        values, vectors = self.spectrum
        weight = jax.nn.softmax(self._log_joint(whitened))
        return -_einsum("k,kij,kj->i", weight, vectors, whitened / jnp.sqrt(values))

    def posterior(self, operator: Callable, y: Float[Array, "*data"], noise: Scalar) -> Self:
        """p(x | y) where y = A x + noise·z with z ~ N(0, I), of a linear `operator` x ↦ A x.

        With S = A C Aᵀ + noise² I and K = C Aᵀ S⁻¹ its weights are ∝ w N(y; A m, S), its means m +
        K(y − A m), its covariances (I − K A) C (I − K A)ᵀ + noise² K Kᵀ. Without noise it has no
        density, but moments, samples and marginals.
        """
        _checks.check_positive_number("noise", noise, zero=True)
        like = jnp.zeros(self.dim, self.means.dtype)
        check_linear(operator, like)
        shape = jax.eval_shape(operator, like).shape
        _checks.check_data("y", y, _checks.CONVERT)
        _checks.check_shape("y", jnp.shape(y), shape, "It is one datum, like operator(x).")
        a = jax.jacfwd(operator)(like).reshape(-1, self.dim)
        residual = jnp.reshape(y, (1, -1)) - _einsum("ij,kj->ki", a, self.means)
        cross = _einsum("ij,kjl->kil", a, self.covariances)
        identity = jnp.eye(len(a), dtype=like.dtype)
        s = _einsum("kil,jl->kij", cross, a) + (noise**2 * identity)[None]
        root = jnp.linalg.cholesky(s)
        if _checks.is_concrete(root) and not np.all(np.isfinite(root)):
            raise _checks.ArgumentError(
                f"`noise` must be above 0 where A C Aᵀ is singular; got {_checks.describe(noise)}."
            )
        solve = jax.vmap(lambda root, b: jax.scipy.linalg.cho_solve((root, True), b))
        gain = jnp.swapaxes(solve(root, cross), 1, 2)
        kept = jnp.eye(self.dim, dtype=like.dtype)[None] - _einsum("kij,jl->kil", gain, a)
        # Of a root R of the covariances R Rᵀ, to keep the small deviations' digits.
        roots = self.spectrum.vectors * jnp.sqrt(self.spectrum.values)[:, None]
        roots = jnp.concatenate([_einsum("kij,kjl->kil", kept, roots), noise * gain], axis=2)
        vectors, deviations, _ = jnp.linalg.svd(roots, full_matrices=False)
        log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=1, axis2=2)), axis=1)
        square = jnp.sum(residual * solve(root, residual), axis=1)
        weights = jax.nn.softmax(jnp.log(self.weights) - 0.5 * (square + log_det))
        means = self.means + _einsum("kij,kj->ki", gain, residual)
        covariances = _einsum("kij,klj->kil", roots, roots)
        spectrum = Spectrum(deviations**2, vectors)
        return self.tree_unflatten(None, (weights, means, covariances, spectrum))

    def _whiten(self, x: Float[Array, " d"]) -> Float[Array, "k d"]:
        """Λ_k^{−½} Q_kᵀ (x − m_k)."""
        _checks.check_shape(
            "x",
            x.shape,
            (self.dim,),
            "The mixture's methods take one point: jax.vmap over a batch.",
        )
        values, vectors = self.spectrum
        return _einsum("kij,ki->kj", vectors, x[None] - self.means) / jnp.sqrt(values)

    def _log_joint(self, whitened: Float[Array, "k d"]) -> Float[Array, " k"]:
        """log w_k + log N(x; m_k, C_k)."""
        log_det = jnp.sum(jnp.log(self.spectrum.values), axis=1) + self.dim * jnp.log(2.0 * jnp.pi)
        return jnp.log(self.weights) - 0.5 * (jnp.sum(whitened**2, axis=1) + log_det)


def marginal(gmm: GaussianMixture, sde: SDE, t: Scalar) -> GaussianMixture:
    """p_t, the law of x_t when x_0 ~ gmm: components N(alpha m, alpha² C + sigma² I)."""
    _checks.check_scalar_time(t, sde)
    alpha, variance = sde.alpha(t), sde.sigma(t) ** 2
    identity = jnp.eye(gmm.dim, dtype=gmm.means.dtype)
    covariances = alpha**2 * gmm.covariances + variance * identity[None]
    spectrum = Spectrum(alpha**2 * gmm.spectrum.values + variance, gmm.spectrum.vectors)
    return GaussianMixture.tree_unflatten(
        None, (gmm.weights, alpha * gmm.means, covariances, spectrum)
    )


def exact_score(gmm: GaussianMixture, sde: SDE) -> Partial:
    """The true score (x, t) ↦ ∇ log p_t(x): a `score_fn` for any sampler, likelihood or loss."""
    return bind(_exact_score, gmm, sde)


def _exact_score(
    gmm: GaussianMixture, sde: SDE, x: Float[Array, " d"], t: Scalar
) -> Float[Array, " d"]:
    return marginal(gmm, sde, t).score(x)


def posterior_mean(
    gmm: GaussianMixture, sde: SDE, x_t: Float[Array, " d"], t: Scalar
) -> Float[Array, " d"]:
    """E[x_0 | x_t] = Σ_k p(k | x_t) [m_k + alpha C_k (alpha² C_k + sigma²)⁻¹(x_t − alpha m_k)]."""
    noised = marginal(gmm, sde, t)
    gain = sde.alpha(t) * gmm.spectrum.values / jnp.sqrt(noised.spectrum.values)
    means = gmm.means + _einsum("kij,kj->ki", gmm.spectrum.vectors, gain * noised._whiten(x_t))
    return _einsum("k,ki->i", noised.responsibilities(x_t), means)


def gaussian_flow(
    gmm: GaussianMixture, sde: SDE, x: Float[Array, " d"], start: Scalar, stop: Scalar
) -> Float[Array, " d"]:
    """The exact probability-flow map from time `start` to `stop` for a single Gaussian (a mixture
    of one component).

    In the eigenbasis, (x − m_t)/√(alpha_t² Λ + sigma_t²) is constant along the flow.
    """
    if gmm.means.shape[0] != 1:
        raise _checks.ArgumentError(
            "`gmm` must have one component, as the map of a mixture has no closed form; got "
            f"{gmm.means.shape[0]}. "
            "Solve probability_flow with exact_score(gmm, sde) instead."
        )
    whitened = marginal(gmm, sde, start)._whiten(x)
    end = marginal(gmm, sde, stop)
    values, vectors = end.spectrum
    return end.means[0] + _einsum("ij,j->i", vectors[0], jnp.sqrt(values[0]) * whitened[0])


def loss_floor(
    key: Key,
    sde: SDE,
    oracle: GaussianMixture,
    *,
    num_samples: int = 10_000,
    weight: Weight = noise_weight,
    times: Times = uniform_times,
) -> Estimate:
    """The least value of `dsm_loss` over all scores, with a standard error: the loss of the exact
    score, E_t weight ½ E‖∇log p(x_t | x_0) − ∇log p_t(x_t)‖², from `num_samples` draws.

    A model's `dsm_loss` less this floor is its `esm_loss`. The standard error takes the times for
    independent: of stratified ones it is too large, of antithetic ones it may be too small.
    """
    _checks.check_key(key)
    if not isinstance(oracle, GaussianMixture):
        raise _checks.ArgumentError(
            f"`oracle` must be a GaussianMixture, whose exact score has the least loss; got "
            f"{type(oracle).__name__}."
        )
    _checks.check_count("num_samples", num_samples, minimum=2)
    data_key, time_key, noise_key = jax.random.split(key, 3)
    t, importance = times(time_key, sde, num_samples)
    x0 = jax.vmap(oracle.sample)(jax.random.split(data_key, num_samples))
    score = exact_score(oracle, sde)
    loss = lambda key, x0, t: denoising_score_matching(key, score, sde, x0, t, weight=weight)  # noqa: E731
    values = importance * jax.vmap(loss)(jax.random.split(noise_key, num_samples), x0, t)
    return Estimate(jnp.mean(values), jnp.std(values, ddof=1) / jnp.sqrt(num_samples))


def _check_mixture(weights: Array, means: Array, covariances: Array) -> None:
    fix = (
        "A mixture of k components in d dimensions has weights [k], means [k, d], "
        "covariances [k, d, d]."
    )
    if means.ndim != 2:
        raise _checks.ArgumentError(f"`means` must have shape [k, d]; got {means.shape}. {fix}")
    k, d = means.shape
    _checks.check_shape("weights", weights.shape, (k,), fix)
    _checks.check_shape("covariances", covariances.shape, (k, d, d), fix)
    for name, value in (("weights", weights), ("means", means), ("covariances", covariances)):
        _checks.check_data(name, value)
    if not _checks.is_concrete(weights, covariances):
        return
    # numpy, which computes at once even inside a trace
    fractions, matrices = np.asarray(weights), np.asarray(covariances)
    if np.any(fractions < 0) or abs(np.sum(fractions) - 1.0) > 1e-5:
        raise _checks.ArgumentError(
            f"`weights` must be at least 0 and sum to 1; got {weights}. Divide by their sum."
        )
    asymmetry = np.max(np.abs(matrices - matrices.transpose(0, 2, 1)))
    if asymmetry > 1e-5 * np.max(np.abs(matrices)):
        raise _checks.ArgumentError(
            "`covariances` must be symmetric. Average them with their transposes."
        )


def _decompose(given: Any, covariances: Array) -> Spectrum:
    """The spectrum, in double precision from the covariances as given where they are concrete."""
    if not _checks.is_concrete(given):
        return Spectrum(*jnp.linalg.eigh(covariances))
    values, vectors = np.linalg.eigh(np.asarray(given, np.float64))
    if np.any(values <= 0):
        raise _checks.ArgumentError(
            f"`covariances` must be positive definite; their least eigenvalue is "
            f"{values.min():.3g}. Add a small multiple of the identity."
        )
    return Spectrum(*(jnp.asarray(part, covariances.dtype) for part in (values, vectors)))
