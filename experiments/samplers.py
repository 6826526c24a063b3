"""Every sampler on one trained model, and on the exact score of the same density.

Eight Gaussians are a mixture, whose score is known at all times. So the table parts what the
sampler gets wrong (beside the exact score) from what the model does (the rest). Every sampler gets
the same number of evaluations but the adaptive one, which counts its own.

Writes model.png and oracle.png (a panel for each sampler), film.png (states of the reverse SDE and
of the probability flow, from the same noise), metrics.json, config.json and score.safetensors.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

import sde_score as ss
from experiments._run import Metrics, as_dict, check_numbers, cli, results_folder, write_json
from sde_score import plots

DENSITY, EXTENT = ss.data.eight_gaussians, (-2.2, 2.2, -2.2, 2.2)
COLORS = np.array(  # of the eight modes (Okabe & Ito 2008)
    ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#333333"]
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    sde: ss.VP | ss.SubVP | ss.VE = ss.VP(t0=1e-3)
    evaluations: int = 16  # of the score for each sample
    tolerance: float = 1e-2  # of the adaptive sampler
    samplers: tuple[str, ...] = ()  # all of them where empty
    num_train: int = 10_000
    width: int = 128
    depth: int = 3
    num_steps: int = 6_000
    batch_size: int = 512
    learning_rate: float = 2e-3
    num_samples: int = 4_000
    seed: int = 0
    params: Path | None = None  # a score.safetensors to evaluate instead of training
    out: Path = Path("runs/samplers")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("seed",))
        if self.evaluations < 6:
            raise ValueError("`evaluations` must be at least 6. Raise it.")
        unknown = set(self.samplers) - set(make_samplers(self))
        if unknown:
            raise ValueError(
                f"`samplers` must be some of {', '.join(make_samplers(self))}; got "
                f"{', '.join(sorted(unknown))}."
            )


def make_samplers(config: Config) -> dict[str, Callable[..., Array | ss.Solution]]:
    """By name, as (key, score_fn, sde, shape) -> a sample, or a `Solution` that has one.

    Equal steps in log-SNR suit the methods of higher order, equal steps in t the others.
    """
    num, half = config.evaluations, config.evaluations // 2
    even = lambda num_steps: ss.uniform_grid(config.sde, num_steps)
    log = lambda num_steps: ss.log_snr_grid(config.sde, num_steps)
    step = lambda step, ts: partial(ss.sample, step=step, ts=ts, finish=None)
    steps = lambda method: partial(ss.sample_multistep, method=method, ts=log(num), finish=None)
    corrected = ss.predictor_corrector(ss.ancestral, ss.langevin(0.16))
    level = ss.VE().sigma(0.0) if config.sde.t0 == 0 else config.sde.sigma(config.sde.t0)
    return {
        "euler_maruyama": step(ss.euler_maruyama, even(num)),
        "reverse_diffusion": step(ss.reverse_diffusion, even(num)),
        "ancestral": step(ss.ancestral, even(num)),
        "ancestral_beta": step(ss.ancestral_beta, even(num)),
        "ddim_eta_half": step(ss.ddim_eta(0.5), even(num)),
        "predictor_corrector": step(corrected, even(half)),
        "annealed_langevin": partial(
            ss.annealed_langevin_sample,
            ts=log(half - 1),
            num_steps=2,
            step_size=level**2,
            finish=None,
        ),
        "shark": partial(ss.solve_sde, solver=diffrax.ShARK(), ts=even(half), finish=None),
        "edm_stochastic": step(ss.edm_stochastic(1.0 / half), even(half)),
        "sde_dpm_solver_pp": steps(ss.sde_dpm_solver_pp()),
        "ddim": step(ss.ddim, even(num)),
        "heun": step(ss.heun, even(half)),
        "dopri5": partial(ss.solve_ode, rtol=config.tolerance, atol=config.tolerance),
        "dpm_solver_pp_2m": steps(ss.dpm_solver_pp(2)),
        "dpm_solver_pp_3m": steps(ss.dpm_solver_pp(3)),
        "unipc": steps(ss.unipc(2)),
        "adams": steps(ss.adams(3)),
    }
