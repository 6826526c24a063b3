"""The U-Nets of the published score SDE models (Song et al. 2021, arXiv 2011.13456, appendix H).

Options replace fields of `UNet`, such as `dtype`, `remat`, `num_classes` or `num_blocks`.
"""

from typing import Any

from sde_score.nets.unet import UNet

FIR_KERNEL = (1.0, 3.0, 3.0, 1.0)


def ddpm(**options: Any) -> UNet:
    """DDPM on CIFAR-10, 35.2 M parameters: `ddpm.py`, attention at 16 × 16."""
    fields = {"num_blocks": 2, "biggan": False, "skip_rescale": False, "groups": 32}
    return UNet(**{**fields, "dropout": 0.1, **options})


def ddpmpp(**options: Any) -> UNet:
    """DDPM++ cont. on CIFAR-10, 61.8 M parameters; deep with num_blocks=8, 106.6 M."""
    return UNet(**{"dropout": 0.1, **options})


def ncsnpp(**options: Any) -> UNet:
    """NCSN++ cont. (VE) on CIFAR-10, 62.8 M parameters; deep with num_blocks=8, 107.6 M.

    For VP and sub-VP set embedding="positional", scale_by_sigma=False and recentre=False. CelebA
    at 64 × 64, trained on discrete times, has the positional embedding too and attention at level
    2; its output is divided by sigma outside.
    """
    fields = {"embedding": "fourier", "scale_by_sigma": True, "recentre": True, "dropout": 0.1}
    fields |= {"fir_kernel": FIR_KERNEL, "progressive_input": "residual"}
    return UNet(**{**fields, **options})


def ncsnpp_256(**options: Any) -> UNet:
    """NCSN++ cont. (VE) on 256 × 256 images, 65.6 M parameters: FFHQ, CelebA-HQ, LSUN."""
    fields = {"multipliers": (1, 1, 2, 2, 2, 2, 2), "num_blocks": 2, "attention_levels": (4,)}
    fields |= {"progressive_input": "input_skip", "progressive_output": "output_skip"}
    return ncsnpp(**{**fields, "dropout": 0.0, **options})
