"""A tiny model with the constants of the published ones, for files that cannot say otherwise, such as pickles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from tests.families.stable_diffusion import few_blocks
from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion


def make_published(folder: Path, layout: Literal["original", "diffusers"] = "original") -> Path:
    """A tiny Stable Diffusion 1 with the published models' norm groups and heads, which no file has to name."""
    few = few_blocks("sd1")
    encoders = (replace(few.encoders[0], heads=1),)
    shape = replace(few, encoders=encoders, autoencoder_widths=(32, 32, 64, 64), groups=32)
    return make_tiny_stable_diffusion(folder, "sd1", layout, seed=5, shape=shape)
