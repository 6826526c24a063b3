"""Contracts over every public function: one trace for all numbers, typed keys only, one example
only.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixture
from jax.tree_util import Partial

import sde_score as ss

SDES = {"vp": ss.VP(t0=1e-2), "subvp": ss.SubVP(t0=1e-2), "ve": ss.VE(sigma_max=5.0)}
X = jnp.array([0.3, -0.4])
GREY = ss.grey_operator((2,))
BATCH = jnp.array([[0.3, -0.4], [1.0, 0.2], [-0.7, 0.1]])


def other(sde):
    """An SDE of the same type with other numbers."""
    name = "sigma_max" if isinstance(sde, ss.VE) else "beta_max"
    return dataclasses.replace(sde, **{name: 0.5 * getattr(sde, name)}, t0=2e-2)


def linear(params, x, t):
    return params["w"] @ x - t * x


FUNCTIONS = {
    "perturb": lambda key, s, sde, t: ss.perturb(key, sde, X, t),
    "log_snr": lambda key, s, sde, t: ss.log_snr(sde, t),
    "time_of_log_snr": lambda key, s, sde, t: ss.time_of_log_snr(sde, t),
    "sample_prior": lambda key, s, sde, t: ss.sample_prior(key, sde, (2,)),
    "prior_log_prob": lambda key, s, sde, t: ss.prior_log_prob(sde, X),
    "reverse_drift": lambda key, s, sde, t: ss.reverse_drift(s, sde, X, t),
    "denoise": lambda key, s, sde, t: ss.denoise(s, sde, X, t),
    "noise_from_score": lambda key, s, sde, t: ss.noise_from_score(sde, s)(X, t),
    "denoiser_from_score": lambda key, s, sde, t: ss.denoiser_from_score(sde, s)(X, t),
    "velocity_from_score": lambda key, s, sde, t: ss.velocity_from_score(sde, s)(X, t),
    "score_from_noise": lambda key, s, sde, t: ss.score_from_noise(sde, s)(X, t),
    "score_from_denoiser": lambda key, s, sde, t: ss.score_from_denoiser(sde, s)(X, t),
    "score_from_velocity": lambda key, s, sde, t: ss.score_from_velocity(sde, s)(X, t),
    "precondition": lambda key, s, sde, t: ss.precondition(sde, s, sigma_data=t)(X, t),
    "diagnose": lambda key, s, sde, t: ss.diagnose(
        *(key, s, sde, jnp.tile(BATCH, (4, 1))),
        **{"ts": jnp.stack([2 * t, t]), "num_waves": 1, "num_probes": 2},
    ),
    "fokker_planck_residual": lambda key, s, sde, t: ss.fokker_planck_residual(s, sde, X, t),
    "divergence": lambda key, s, sde, t: ss.divergence(lambda x: s(x, t), X),
    "dsm_loss": lambda key, s, sde, t: ss.dsm_loss(key, s, sde, BATCH),
    "ism_loss": lambda key, s, sde, t: ss.ism_loss(key, s, sde, BATCH),
    "ssm_loss": lambda key, s, sde, t: ss.ssm_loss(key, s, sde, BATCH, times=ss.likelihood_times),
    "esm_loss": lambda key, s, sde, t: ss.esm_loss(key, s, sde, BATCH, true_score=lambda x, t: -x),
    "fdsm_loss": lambda key, s, sde, t: ss.fdsm_loss(
        key, s, sde, BATCH, weight=ss.min_snr_weight(t), step_size=t, probes=ss.sphere_probes
    ),
    "edm_loss": lambda key, s, sde, t: ss.edm_loss(
        key, s, sde, BATCH, sigma_data=t, times=ss.lognormal_times(mean=t, std=t)
    ),
    "sample": lambda key, s, sde, t: ss.sample(key, s, sde, (2,), ts=ss.uniform_grid(sde, 3)),
    "sample_heun": lambda key, s, sde, t: ss.sample(
        key, s, sde, (2,), step=ss.heun, ts=ss.karras_grid(sde, 3)
    ),
    "sample_multistep": lambda key, s, sde, t: ss.sample_multistep(
        key, s, sde, (2,), method=ss.adams(sigma_data=t), ts=ss.log_snr_grid(sde, 3)
    ),
    "fit_grid": lambda key, s, sde, t: ss.fit_grid(
        *(key, s, sde, (2,), 3),
        sampler=Partial(ss.sample, step=ss.ddim),
        **{"num_samples": 2, "num_iterations": 2, "fine_steps": 4},
    ),
    "sample_sde": lambda key, s, sde, t: ss.sample_sde(
        key, s, sde, (2,), ts=ss.log_snr_grid(sde, 3)
    ),
    "sample_ode": lambda key, s, sde, t: ss.sample_ode(key, s, sde, (2,), rtol=1e-2, atol=1e-2),
    "probability_flow": lambda key, s, sde, t: ss.probability_flow(
        s, sde, X, start=sde.t0, stop=sde.t1, rtol=1e-2, atol=1e-2
    ),
    "log_likelihood": lambda key, s, sde, t: ss.log_likelihood(key, s, sde, X, rtol=1e-2),
    "exact_log_likelihood": lambda key, s, sde, t: ss.exact_log_likelihood(s, sde, X, rtol=1e-2),
    "langevin_sample": lambda key, s, sde, t: ss.langevin_sample(
        key, lambda x: s(x, t), X, step_size=t, num_steps=3
    ),
    "annealed_langevin_sample": lambda key, s, sde, t: ss.annealed_langevin_sample(
        key, s, sde, (2,), ts=ss.uniform_grid(sde, 2), step_size=t, num_steps=2
    ),
    "mala_sample": lambda key, s, sde, t: ss.mala_sample(
        key, lambda x: jnp.sum(x * s(x, t)), X, step_size=t, num_steps=2
    ),
    "predictor_corrector": lambda key, s, sde, t: ss.predictor_corrector(
        ss.reverse_diffusion, ss.langevin(t, num_steps=2)
    )(key, s, sde, X, t, 0.5 * t),
    "batch_langevin": lambda key, s, sde, t: ss.batch_langevin(t)(
        key, jax.vmap(s, (0, None)), sde, BATCH, t, 0.5 * t
    ),
    "ddim_eta": lambda key, s, sde, t: ss.ddim_eta(t)(key, s, sde, X, t, 0.5 * t),
    "edm_stochastic": lambda key, s, sde, t: ss.edm_stochastic(t)(key, s, sde, X, t, 0.5 * t),
    "classifier_guidance": lambda key, s, sde, t: ss.classifier_guidance(s, s, 1, scale=t)(X, t),
    "classifier_free": lambda key, s, sde, t: ss.classifier_free(
        lambda x, t, context: context * s(x, t), t, 0.0, t, interval=(0.1, t)
    )(X, t),
    "classifier_loss": lambda key, s, sde, t: ss.classifier_loss(
        key, s, sde, BATCH, jnp.array([0, 1, 1])
    ),
    "inpaint": lambda key, s, sde, t: ss.inpaint(
        ss.ddim, t * X, jnp.array([True, False]), num_resamples=2
    )(key, s, sde, X, t, 0.5 * t),
    "colourise": lambda key, s, sde, t: ss.colourise(ss.ddim, t)(
        key, lambda x, t: -t * x, sde, jnp.ones(3), t, 0.5 * t
    ),
    "dps": lambda key, s, sde, t: ss.dps(s, sde, GREY, t, scale=t)(X, t),
    "pgdm": lambda key, s, sde, t: ss.pgdm(s, sde, GREY, t, noise=t, sigma_data=t)(X, t),
    "twisted_smc": lambda key, s, sde, t: ss.twisted_smc(
        key, s, sde, GREY, t, noise=t, num_particles=3, ts=ss.uniform_grid(sde, 2)
    ),
    "random_projection": lambda key, s, sde, t: ss.random_projection(key, (2,), 1)(t * X),
    "score_from_preconditioned": lambda key, s, sde, t: ss.score_from_preconditioned(
        sde, s, sigma_data=t
    )(X, t),
    "hutchinson_divergence": lambda key, s, sde, t: ss.hutchinson_divergence(
        lambda x: s(x, t), X, ss.rademacher_probes(key, 2, (2,))
    ),
    "denoising_score_matching": lambda key, s, sde, t: ss.denoising_score_matching(
        key, s, sde, X, t
    ),
    "explicit_score_matching": lambda key, s, sde, t: ss.explicit_score_matching(
        lambda x: s(x, t), lambda x: -x, X
    ),
    "implicit_score_matching": lambda key, s, sde, t: ss.implicit_score_matching(
        lambda x: s(x, t), X
    ),
    "sliced_score_matching": lambda key, s, sde, t: ss.sliced_score_matching(
        lambda x: s(x, t), X, ss.gaussian_probes(key, 2, (2,))
    ),
    "finite_difference_score_matching": lambda key, s, sde, t: ss.finite_difference_score_matching(
        lambda x: s(x, t), X, ss.sphere_probes(key, 2, (2,)), step_size=t
    ),
    "single_sigma_score_matching": lambda key, s, sde, t: ss.single_sigma_score_matching(
        key, lambda x: s(x, t), X, sigma=t
    ),
    "loss_floor": lambda key, s, sde, t: ss.loss_floor(
        key,
        sde,
        ss.GaussianMixture(*(jnp.asarray(part) for part in mixture())),
        num_samples=3,
        times=ss.grid_times(jnp.stack([t, 2 * t])),
    ),
    "antithetic_times": lambda key, s, sde, t: ss.antithetic_times(key, sde, 3),
    "uniform_times": lambda key, s, sde, t: ss.uniform_times(key, sde, 3),
    "stratified_times": lambda key, s, sde, t: ss.stratified_times(key, sde, 3),
    "weights": lambda key, s, sde, t: (ss.noise_weight(sde, t), ss.likelihood_weight(sde, t)),
    "score_from_energy": lambda key, s, sde, t: ss.score_from_energy(
        lambda x, t: jnp.sum(s(x, t) ** 2)
    )(X, t),
    "curl": lambda key, s, sde, t: ss.curl(
        lambda x: s(x, t) + t * jnp.sin(x[::-1] * jnp.arange(2)), X
    ),
    "log_density_ratio": lambda key, s, sde, t: ss.log_density_ratio(
        lambda x: s(x, t), X, 2.0 * X, num_points=2
    ),
    "bandwidths": lambda key, s, sde, t: (
        *(ss.scott_bandwidth(t * BATCH), ss.silverman_bandwidth(t * BATCH)),
        *(ss.cross_validated_bandwidth(t * BATCH), ss.propose_sigma(t * BATCH)),
    ),
    "kernel_density_log_prob": lambda key, s, sde, t: ss.kernel_density_log_prob(BATCH, t)(X),
    "kernel_density_score": lambda key, s, sde, t: ss.kernel_density_score(BATCH, t)(X),
    "stein_score": lambda key, s, sde, t: ss.stein_score(BATCH, bandwidth=t, ridge=t)(X),
    "integrate": lambda key, s, sde, t: ss.integrate(s, X, start=0.0, stop=t, rtol=1e-2),
    "probability_flow_field": lambda key, s, sde, t: ss.probability_flow_field(s, sde)(X, t),
    "spherical_interpolation": lambda key, s, sde, t: ss.spherical_interpolation(
        X, t * X[::-1], t
    ),
    "flow_log_prob": lambda key, s, sde, t: ss.flow_log_prob(key, s, X, stop=t, rtol=1e-2),
    "exact_flow_log_prob": lambda key, s, sde, t: ss.exact_flow_log_prob(s, X, stop=t, rtol=0.1),
    "flow_loss": lambda key, s, sde, t: ss.flow_loss(key, s, BATCH, stop=t, rtol=0.1),
    "sample_flow": lambda key, s, sde, t: ss.sample_flow(key, s, (2,), stop=t, rtol=0.1),
    "sample_with_log_likelihood": lambda key, s, sde, t: ss.sample_with_log_likelihood(
        key, s, sde, (2,), rtol=1e-2
    ),
    "log_likelihood_bound": lambda key, s, sde, t: ss.log_likelihood_bound(
        key, s, sde, X, num_draws=3
    ),
    "bits_per_dim": lambda key, s, sde, t: ss.bits_per_dim(
        -t, 2, num_levels=4, data_range=(0.0, 1.0)
    ),
    "entropy_surrogate": lambda key, s, sde, t: ss.entropy_surrogate(
        lambda z: s(z, t), lambda noise: t * noise, jax.random.normal(key, (2,))
    ),
    "uniform_dequantize": lambda key, s, sde, t: ss.uniform_dequantize(
        key, jnp.arange(3), num_levels=3, data_range=(0.0, 1.0)
    ),
}
ELSEWHERE = {  # traced once in tests of their own, or inside a function above
    *("scott_bandwidth", "silverman_bandwidth", "cross_validated_bandwidth", "propose_sigma"),
    *("marginal", "exact_score", "posterior_mean", "gaussian_flow", "solve_ode", "solve_sde"),
    *("euler_maruyama", "heun", "ddim", "ancestral", "uniform_grid", "log_snr_grid"),
    *("dpm_solver_pp", "unipc", "adams", "sde_dpm_solver_pp"),
    *("reverse_diffusion", "ancestral_beta", "langevin"),
    *("karras_grid", "likelihood_times", "noise_weight", "likelihood_weight"),
    *("rademacher_probes", "gaussian_probes", "sphere_probes", "make_train_step"),
    "make_alternating_step",
    *("add_guidance", "condition", "keep_observed", "linear_operator", "with_singular_values"),
    *("mask_operator", "grey_operator", "downsampling_operator", "blur_operator"),
    *("lognormal_times", "grid_times", "min_snr_weight", "static_threshold", "dynamic_threshold"),
}
UNTRACED = {"map_in_chunks", "print_progress", "dataset_log_likelihood", "confidence_interval"}
UNTRACED |= {"summarize_diagnosis"}
UNTRACED |= {"load_chunks", "map_to_disk"}
UNTRACED |= {"train", "make_mesh", "replicate", "shard_batches", "shard_params"}
UNTRACED |= {"fit", "init_train_state", "load_params", "save_params", "register_pytree"}


def test_every_public_function_is_under_the_contract():
    functions = {n for n, f in vars(ss).items() if inspect.isfunction(f) and n[0] != "_"}
    assert functions - set(FUNCTIONS) - ELSEWHERE - UNTRACED == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_new_numbers_never_trace_again(name):
    """Another SDE of its type, new parameters, time and key: one trace, and other results."""
    traced = jax.jit(chex.assert_max_traces(FUNCTIONS[name], n=1))
    sde = SDES["vp"]
    results = [
        traced(
            jax.random.key(i),
            Partial(linear, {"w": (i - 1.5) * jnp.eye(2)}),
            numbers,
            0.3 + 0.1 * i,
        )
        for i, numbers in enumerate((sde, other(sde)))
    ]
    chex.clear_trace_counter()
    first, second = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(r)]) for r in results)
    assert np.isfinite(first[:1]).all() and not np.array_equal(first, second)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_oracle_never_traces_again(sde):
    def closed_form(gmm, sde, x, t):
        single = ss.GaussianMixture(jnp.ones(1), gmm.means[:1], gmm.covariances[:1])
        return (
            ss.exact_score(gmm, sde)(x, t),
            ss.posterior_mean(gmm, sde, x, t),
            ss.marginal(gmm, sde, t).log_prob(x),
            ss.gaussian_flow(single, sde, x, t, sde.t1),
        )

    traced = jax.jit(chex.assert_max_traces(closed_form, n=1))
    weights, means, covariances = mixture()
    for numbers, scale in ((sde, 1.0), (other(sde), 2.0)):
        gmm = ss.GaussianMixture(weights, scale * means, covariances)
        assert all(np.isfinite(x).all() for x in traced(gmm, numbers, X, 0.5))
    chex.clear_trace_counter()


def _takes_key(name):
    value = getattr(ss, name)
    return inspect.isfunction(value) and "key" in list(inspect.signature(value).parameters)[:1]


ARGUMENTS = {
    "sde": SDES["vp"],
    "oracle": None,
    "net_fn": lambda x, c_noise: -x,
    "true_score": lambda x, t: -x,
    "sigma": 0.5,
    "sigma_data": 0.5,
    "shape": (2,),
    "score_fn": lambda x, t=0.0: -x,
    "x": X,
    "x0": BATCH,
    "t": 0.5,
    "num": 2,
    "levels": np.array([1, 2]),
    "num_levels": 3,
    "data_range": (0.0, 1.0),
    "data": BATCH,
    "batch": BATCH,
    "field": lambda x, t: -x,
    **{"method": None, "sampler": None},
    **{"operator": None, "y": None, "noise": 0.1, "num_particles": 1},
    **{"logits_fn": None, "labels": None},
    "step_size": 0.1,
    "num_steps": 1,
    "loss_fn": lambda params, key, batch: params["w"],
    "params": {"w": jnp.array(1.0)},
    "optimizer": None,
    "batches": None,
    "folder": "none",
    "ts": np.array([1.0, 0.5]),
    "log_prob": lambda x: -0.5 * jnp.sum(x**2),
}
INNER = {"euler_maruyama", "heun", "ddim", "ancestral"}  # `sample` has checked the key
INNER |= {"reverse_diffusion", "ancestral_beta"}
INNER |= {"uniform_times", "stratified_times", "likelihood_times"}  # the loss has


@pytest.mark.parametrize("name", [n for n in vars(ss) if _takes_key(n) and n not in INNER])
@pytest.mark.parametrize(
    "key", [np.zeros(2, np.uint32), jax.random.split(jax.random.key(0), 3), 0]
)
def test_only_one_typed_key_is_taken(name, key):
    function = getattr(ss, name)
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name != "key"
    ]
    with pytest.raises(ValueError, match="`key` must be (a typed key|one key)"):
        function(key, **{argument: ARGUMENTS[argument] for argument in needed})


BATCHED = {
    "returns more than one example": lambda x, t=0.0: jnp.stack([x, x]),
    "indexes the batch axis": lambda x, t=0.0: x * jnp.asarray(t)[:, None],
}
CONSUMERS = {
    "dsm_loss": lambda s: ss.dsm_loss(jax.random.key(0), s, SDES["vp"], BATCH),
    "sample": lambda s: ss.sample(jax.random.key(0), s, SDES["vp"], (2,)),
    "sample_sde": lambda s: ss.sample_sde(jax.random.key(0), s, SDES["vp"], (2,)),
    "sample_ode": lambda s: ss.sample_ode(jax.random.key(0), s, SDES["vp"], (2,)),
    "log_likelihood": lambda s: ss.log_likelihood(jax.random.key(0), s, SDES["vp"], X),
    "denoise": lambda s: ss.denoise(s, SDES["vp"], X, 0.5),
    "langevin_sample": lambda s: ss.langevin_sample(
        jax.random.key(0), s, X, step_size=0.1, num_steps=1
    ),
    "annealed": lambda s: ss.annealed_langevin_sample(
        jax.random.key(0), s, SDES["vp"], (2,), ts=np.array([1.0, 0.5]), step_size=0.1, num_steps=1
    ),
    "implicit": lambda s: ss.implicit_score_matching(s, X),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("network", BATCHED)
def test_a_batched_network_is_told_how_to_be_wrapped(consumer, network):
    with pytest.raises(
        ValueError, match="takes one example, x of shape .*: wrap a batched network"
    ):
        CONSUMERS[consumer](BATCHED[network])


def test_classes_of_equally_many_fields_are_different_structures():
    """What jax.tree_util.register_dataclass does not promise: see `register_pytree`."""

    def make(i):
        fields = [("a", float, float(i)), ("b", float, 0.0)]
        cls = dataclasses.make_dataclass(f"SDE{i}", fields, frozen=True)
        cls.index = property(lambda self: i)
        return ss.register_pytree(cls)

    instances = [make(i)() for i in range(50)]
    structures = [jax.tree.structure(instance) for instance in [*instances, *SDES.values()]]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
    indices = jax.jit(lambda instance: instance.index + 0.0 * instance.a)
    assert [float(indices(instance)) for instance in instances] == list(range(50))
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ss.VP())
    ]
    assert paths == [".beta_min", ".beta_max", ".t0", ".t1"]


def test_the_sde_of_the_readme_obeys_the_protocol():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class Ornstein" in b
    )
    scope = {"ss": ss, "jnp": jnp, "dataclasses": dataclasses}
    exec(block, scope)  # noqa: S102
    sde, t = scope["OrnsteinUhlenbeck"](), 0.7
    assert isinstance(sde, ss.SDE)
    rate = jax.grad(lambda t: jnp.log(sde.alpha(t)))(t)
    growth = jax.grad(lambda t: sde.sigma(t) ** 2)(t)
    np.testing.assert_allclose(sde.drift(1.0, t), rate, rtol=1e-6)  # float32
    squared = sde.diffusion(t) ** 2
    np.testing.assert_allclose(squared, growth - 2 * rate * sde.sigma(t) ** 2, rtol=1e-6)


EAGER = {
    "sample_ode": lambda sde, s: ss.sample_ode(jax.random.key(0), s, sde, (2,), rtol=1e-2),
    "sample_sde": lambda sde, s: ss.sample_sde(
        jax.random.key(0), s, sde, (2,), ts=jnp.array([1.0, 0.5, 0.1])
    ),
    "log_likelihood": lambda sde, s: ss.exact_log_likelihood(s, sde, X, rtol=1e-2, atol=1e-2),
}


@pytest.mark.parametrize("name", EAGER)
def test_new_numbers_never_recompile_a_solve_outside_jit_either(name):
    """Python numbers in an SDE are data for diffrax too: its solve is traced once."""
    traced = []

    def score(x, t):
        traced.append(t)
        return -x

    score = Partial(score)
    first = EAGER[name](ss.VP(), score)
    count = len(traced)
    second = EAGER[name](ss.VP(beta_max=15.0), score)
    tail = 1 if name == "sample_sde" else 0  # `finish` runs outside the solve
    assert count > tail and len(traced) - count == tail
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


NARROW = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_narrow_data_are_computed_in_float32(sde, dtype):
    """Times and states keep float32's digits, whatever the data come in."""
    score = lambda x, t: -x
    options = {"weight": ss.likelihood_weight, "times": ss.likelihood_times}
    narrow = ss.dsm_loss(jax.random.key(0), score, sde, BATCH.astype(dtype), **options)
    rounded = BATCH.astype(dtype).astype(jnp.float32)
    wide = ss.dsm_loss(jax.random.key(0), score, sde, rounded, **options)
    assert narrow == wide
    ts = jnp.array([sde.t1, sde.t0])
    drawn = ss.sample(jax.random.key(0), score, sde, (2,), ts=ts, init=X.astype(dtype))
    assert drawn.dtype == jnp.float32


@pytest.mark.parametrize("t", [-1.0, 0.0, 2.0])
def test_times_outside_the_sde_are_refused_everywhere(t):
    sde, score = SDES["vp"], lambda x, t: -x
    gmm = ss.GaussianMixture(*mixture())
    for use in (
        lambda: ss.reverse_drift(score, sde, X, t),
        lambda: ss.denoise(score, sde, X, t),
        lambda: ss.log_snr(sde, t),
        lambda: ss.marginal(gmm, sde, t),
        lambda: ss.exact_score(gmm, sde)(X, t),
        lambda: ss.score_from_noise(sde, score)(X, t),
        lambda: ss.precondition(sde, score, sigma_data=1.0)(X, t),
    ):
        with pytest.raises(ValueError, match=r"`t` must lie in \[t0, t1\] = \[0.01, 1.0\] of VP"):
            use()


def test_wrong_types_are_named():
    score, key = lambda x, t: -x, lambda: jax.random.key(0)
    net = ss.nets.MLP(width=8, depth=1)
    params = net.init(key(), X, 0.5)
    learned = ss.score_from_noise(ss.VP(), Partial(net.apply, params))
    for use, words in (
        (
            lambda: ss.sample_ode(key(), score, ss.VP(), (2,), solver="tsit5"),
            "`solver` must be one",
        ),
        (lambda: ss.sample_ode(key(), score, ss.VP, (2,)), "`sde` must be an SDE.*an instance"),
        (lambda: ss.sample(key(), score, ss.VP(), (-1,)), "`shape` must be a tuple of positive"),
        (lambda: ss.denoise(learned, ss.VP(), jnp.ones((5, 2)), 0.5), "failed on one example"),
        (lambda: ss.sample(key(), learned, ss.VP(), (3,)), "failed on one example.*Shape"),
    ):
        with pytest.raises(ValueError, match=words):
            use()
