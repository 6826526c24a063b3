"""Flax Linen networks on one example; the rest of the library never imports them."""

from sde_score.nets import presets as presets
from sde_score.nets.classifier import Classifier as Classifier
from sde_score.nets.classifier import Conditional as Conditional
from sde_score.nets.concat_squash import ConcatSquash as ConcatSquash
from sde_score.nets.embedding import fourier_embedding as fourier_embedding
from sde_score.nets.embedding import geometric_frequencies as geometric_frequencies
from sde_score.nets.energy import EnergyMLP as EnergyMLP
from sde_score.nets.mlp import MLP as MLP
from sde_score.nets.unet import Context as Context
from sde_score.nets.unet import UNet as UNet
