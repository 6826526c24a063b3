"""Score-based generative modelling through stochastic differential equations, in pure-functional
JAX.
"""

# ruff: noqa: E402, I001
from sde_score._xla import guard_cpu_reductions as _guard_cpu_reductions

_guard_cpu_reductions()

from sde_score import data as data
from sde_score import metrics as metrics
from sde_score import nets as nets
from sde_score._typing import SDE as SDE
from sde_score._typing import Key as Key
from sde_score._typing import Params as Params
from sde_score._typing import ScoreFn as ScoreFn
from sde_score._typing import Step as Step
from sde_score._typing import register_pytree as register_pytree
from sde_score.baselines import cross_validated_bandwidth as cross_validated_bandwidth
from sde_score.baselines import kernel_density_log_prob as kernel_density_log_prob
from sde_score.baselines import kernel_density_score as kernel_density_score
from sde_score.baselines import propose_sigma as propose_sigma
from sde_score.baselines import scott_bandwidth as scott_bandwidth
from sde_score.baselines import silverman_bandwidth as silverman_bandwidth
from sde_score.baselines import stein_score as stein_score
from sde_score.chunks import ChunkError as ChunkError
from sde_score.chunks import map_in_chunks as map_in_chunks
from sde_score.chunks import print_progress as print_progress
from sde_score.diagnostics import Diagnosis as Diagnosis
from sde_score.diagnostics import diagnose as diagnose
from sde_score.diagnostics import fokker_planck_residual as fokker_planck_residual
from sde_score.diagnostics import summarize_diagnosis as summarize_diagnosis
from sde_score.diffeq import Solution as Solution
from sde_score.divergence import divergence as divergence
from sde_score.divergence import gaussian_probes as gaussian_probes
from sde_score.divergence import hutchinson_divergence as hutchinson_divergence
from sde_score.divergence import rademacher_probes as rademacher_probes
from sde_score.divergence import sphere_probes as sphere_probes
from sde_score.evaluation import confidence_interval as confidence_interval
from sde_score.evaluation import dataset_log_likelihood as dataset_log_likelihood
from sde_score.flow import Likelihood as Likelihood
from sde_score.flow import exact_flow_log_prob as exact_flow_log_prob
from sde_score.flow import flow_log_prob as flow_log_prob
from sde_score.flow import flow_loss as flow_loss
from sde_score.flow import sample_flow as sample_flow
from sde_score.gaussian_mixture import GaussianMixture as GaussianMixture
from sde_score.gaussian_mixture import exact_score as exact_score
from sde_score.gaussian_mixture import gaussian_flow as gaussian_flow
from sde_score.gaussian_mixture import loss_floor as loss_floor
from sde_score.gaussian_mixture import marginal as marginal
from sde_score.gaussian_mixture import posterior_mean as posterior_mean
from sde_score.likelihood import exact_log_likelihood as exact_log_likelihood
from sde_score.likelihood import log_likelihood as log_likelihood
from sde_score.likelihood import log_likelihood_bound as log_likelihood_bound
from sde_score.likelihood import sample_with_log_likelihood as sample_with_log_likelihood
from sde_score.losses.denoising import denoising_score_matching as denoising_score_matching
from sde_score.losses.denoising import dsm_loss as dsm_loss
from sde_score.losses.denoising import edm_loss as edm_loss
from sde_score.losses.denoising import esm_loss as esm_loss
from sde_score.losses.denoising import fdsm_loss as fdsm_loss
from sde_score.losses.denoising import ism_loss as ism_loss
from sde_score.losses.denoising import ssm_loss as ssm_loss
from sde_score.losses.score_matching import explicit_score_matching as explicit_score_matching
from sde_score.losses.score_matching import (
    finite_difference_score_matching as finite_difference_score_matching,
)
from sde_score.losses.score_matching import implicit_score_matching as implicit_score_matching
from sde_score.losses.score_matching import (
    single_sigma_score_matching as single_sigma_score_matching,
)
from sde_score.losses.score_matching import sliced_score_matching as sliced_score_matching
from sde_score.losses.times import antithetic_times as antithetic_times
from sde_score.losses.times import grid_times as grid_times
from sde_score.losses.times import likelihood_times as likelihood_times
from sde_score.losses.times import likelihood_weight as likelihood_weight
from sde_score.losses.times import lognormal_times as lognormal_times
from sde_score.losses.times import min_snr_weight as min_snr_weight
from sde_score.losses.times import noise_weight as noise_weight
from sde_score.losses.times import stratified_times as stratified_times
from sde_score.losses.times import uniform_times as uniform_times
from sde_score.nets.energy import curl as curl
from sde_score.nets.energy import log_density_ratio as log_density_ratio
from sde_score.nets.energy import score_from_energy as score_from_energy
from sde_score.parameterization import denoise as denoise
from sde_score.parameterization import denoiser_from_score as denoiser_from_score
from sde_score.parameterization import dynamic_threshold as dynamic_threshold
from sde_score.parameterization import noise_from_score as noise_from_score
from sde_score.parameterization import precondition as precondition
from sde_score.parameterization import score_from_denoiser as score_from_denoiser
from sde_score.parameterization import score_from_noise as score_from_noise
from sde_score.parameterization import score_from_preconditioned as score_from_preconditioned
from sde_score.parameterization import score_from_velocity as score_from_velocity
from sde_score.parameterization import static_threshold as static_threshold
from sde_score.parameterization import velocity_from_score as velocity_from_score
from sde_score.quantization import bits_per_dim as bits_per_dim
from sde_score.quantization import uniform_dequantize as uniform_dequantize
from sde_score.sampling.continuous import integrate as integrate
from sde_score.sampling.continuous import probability_flow as probability_flow
from sde_score.sampling.continuous import probability_flow_field as probability_flow_field
from sde_score.sampling.continuous import sample_ode as sample_ode
from sde_score.sampling.continuous import sample_sde as sample_sde
from sde_score.sampling.continuous import solve_ode as solve_ode
from sde_score.sampling.continuous import solve_sde as solve_sde
from sde_score.sampling.continuous import spherical_interpolation as spherical_interpolation
from sde_score.sampling.correctors import batch_langevin as batch_langevin
from sde_score.sampling.correctors import langevin as langevin
from sde_score.sampling.correctors import predictor_corrector as predictor_corrector
from sde_score.sampling.fit_grid import fit_grid as fit_grid
from sde_score.sampling.grid import Multistep as Multistep
from sde_score.sampling.grid import karras_grid as karras_grid
from sde_score.sampling.grid import log_snr_grid as log_snr_grid
from sde_score.sampling.grid import sample as sample
from sde_score.sampling.grid import sample_multistep as sample_multistep
from sde_score.sampling.grid import uniform_grid as uniform_grid
from sde_score.sampling.langevin import MALA as MALA
from sde_score.sampling.langevin import annealed_langevin_sample as annealed_langevin_sample
from sde_score.sampling.langevin import langevin_sample as langevin_sample
from sde_score.sampling.langevin import mala_sample as mala_sample
from sde_score.sampling.multistep import adams as adams
from sde_score.sampling.multistep import dpm_solver_pp as dpm_solver_pp
from sde_score.sampling.multistep import sde_dpm_solver_pp as sde_dpm_solver_pp
from sde_score.sampling.multistep import unipc as unipc
from sde_score.sampling.steps import ancestral as ancestral
from sde_score.sampling.steps import ancestral_beta as ancestral_beta
from sde_score.sampling.steps import ddim as ddim
from sde_score.sampling.steps import ddim_eta as ddim_eta
from sde_score.sampling.steps import edm_stochastic as edm_stochastic
from sde_score.sampling.steps import euler_maruyama as euler_maruyama
from sde_score.sampling.steps import heun as heun
from sde_score.sampling.steps import reverse_diffusion as reverse_diffusion
from sde_score.sde import VE as VE
from sde_score.sde import VP as VP
from sde_score.sde import SubVP as SubVP
from sde_score.sde import log_snr as log_snr
from sde_score.sde import perturb as perturb
from sde_score.sde import prior_log_prob as prior_log_prob
from sde_score.sde import reverse_drift as reverse_drift
from sde_score.sde import sample_prior as sample_prior
from sde_score.sde import time_of_log_snr as time_of_log_snr
from sde_score.training.loop import fit as fit
from sde_score.training.parameters import load_params as load_params
from sde_score.training.parameters import save_params as save_params
from sde_score.training.state import TrainState as TrainState
from sde_score.training.state import init_train_state as init_train_state
from sde_score.training.state import make_train_step as make_train_step

__version__ = "0.1.0"
