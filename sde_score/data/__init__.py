"""Data: densities on the plane, digits, photographs, images on disk, scaling, batches."""

from sde_score.data.augment import random_crop as random_crop
from sde_score.data.augment import random_flip as random_flip
from sde_score.data.batches import batches as batches
from sde_score.data.builtin import Examples as Examples
from sde_score.data.builtin import Split as Split
from sde_score.data.builtin import digits as digits
from sde_score.data.builtin import patches as patches
from sde_score.data.scaling import Standardizer as Standardizer
from sde_score.data.scaling import standardize as standardize
from sde_score.data.stream import stream as stream
from sde_score.data.tfds import load as load
from sde_score.data.tfds import open_source as open_source
from sde_score.data.toy import Density2D as Density2D
from sde_score.data.toy import checkerboard as checkerboard
from sde_score.data.toy import circles as circles
from sde_score.data.toy import eight_gaussians as eight_gaussians
from sde_score.data.toy import pinwheel as pinwheel
from sde_score.data.toy import swiss_roll as swiss_roll
from sde_score.data.toy import two_moons as two_moons
from sde_score.data.toy import two_spirals as two_spirals
