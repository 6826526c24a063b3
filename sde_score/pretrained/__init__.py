"""Published weights in our U-Net: `score_sde.load` for the checkpoints of score SDE,
`diffusers.load` for folders of diffusers. `save_pretrained` and `load_pretrained` have a file of
our own, to which `python -m sde_score.pretrained` converts.
"""

from sde_score.pretrained import diffusers as diffusers
from sde_score.pretrained import score_sde as score_sde
from sde_score.pretrained.export import load_pretrained as load_pretrained
from sde_score.pretrained.export import save_pretrained as save_pretrained
from sde_score.pretrained.score_sde import Pretrained as Pretrained
