"""Deep Shrink: at high noise, the inner blocks of the U-Net work on a smaller image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DeepShrinkOptions:
    """Deep Shrink"""

    ds_depth_1: int | None = None
    """The block before which the image is shrunk: 0 to 3, with SDXL 0 to 8; unset means no Deep Shrink."""
    ds_timesteps_1: int = 650
    """It is shrunk there down to this timestep, 999 (noise) to 0 (image)."""
    ds_depth_2: int | None = None
    """The block before which it is shrunk below --ds_timesteps_1; unset means that it is not."""
    ds_timesteps_2: int = 650
    """It is shrunk before --ds_depth_2 down to this timestep."""
    ds_ratio: float = 0.5
    """To which share of its height and width it is shrunk, above 0 to 1."""
