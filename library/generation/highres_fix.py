"""Highres. fix of ``gen_img.py``: a small image is drawn first, then a large one over it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HighresOptions:
    """Highres. fix"""

    highres_fix_scale: float | None = None
    """Draw an image of this share of width and height first, then the whole size over it; 0.5 is usual."""
    highres_fix_steps: int = 28
    """Steps of the first, smaller image."""
    highres_fix_strength: float | None = None
    """Strength of the first image with --image_path; unset means --strength, which is the second image's."""
    highres_fix_save_1st: bool = False
    """Keep the first images, too."""
    highres_fix_latents_upscaling: bool = False
    """Enlarge the first image's latents and not the image itself."""
    highres_fix_upscaler: str | None = None
    """Python module that enlarges the first image, such as tools.latent_upscaler."""
    highres_fix_upscaler_args: str | None = None
    """What the module is told: "key=value;key=value"."""
    highres_fix_disable_control_net: bool = False
    """ControlNet acts on the first image only."""
