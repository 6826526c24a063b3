"""Distances between two samples: arrays in, value and standard error out."""

from sde_score.metrics.frechet import frechet_distance as frechet_distance
from sde_score.metrics.two_sample import Estimate as Estimate
from sde_score.metrics.two_sample import c2st as c2st
from sde_score.metrics.two_sample import energy_distance as energy_distance
from sde_score.metrics.two_sample import median_bandwidth as median_bandwidth
from sde_score.metrics.two_sample import mmd as mmd
from sde_score.metrics.two_sample import sliced_wasserstein as sliced_wasserstein
