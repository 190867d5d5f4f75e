"""Gradual Latent: the image begins small and grows while it is drawn (sampler euler_a)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from library.options import Aliases


@dataclass
class GradualLatentOptions:
    """Gradual Latent"""

    gradual_latent_timesteps: int | None = None
    """The image grows below this timestep, 999 (noise) to 0 (image); 750 is usual, unset means no Gradual Latent."""
    gradual_latent_ratio: float = 0.5
    """The share of its height and width that it begins with, above 0 to 1."""
    gradual_latent_ratio_step: float = 0.125
    """By how much the share grows each time."""
    gradual_latent_every_n_steps: Annotated[int, Aliases("gradual_latent_ratio_every_n_steps")] = 3
    """It grows every so many steps."""
    gradual_latent_s_noise: float = 1.0
    """Strength of the noise that a growing step adds."""
    gradual_latent_unsharp_params: str | None = None
    """Sharpen what has grown: "ksize,sigma,strength" or "ksize,sigma,strength,target_x", such as 3,0.5,0.5,1."""
