"""Flax Linen networks on one example; the rest of the library never imports them."""

from sde_score.nets.concat_squash import ConcatSquash as ConcatSquash
from sde_score.nets.embedding import fourier_embedding as fourier_embedding
from sde_score.nets.embedding import geometric_frequencies as geometric_frequencies
from sde_score.nets.energy import EnergyMLP as EnergyMLP
from sde_score.nets.mlp import MLP as MLP
