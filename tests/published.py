"""A tiny model with the constants of the published ones, for files that cannot say otherwise, such as pickles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from tools.make_tiny_stable_diffusion import CLIP_L, SHAPES, make_tiny_stable_diffusion


def make_published(folder: Path, layout: Literal["original", "diffusers"] = "original") -> Path:
    """A tiny Stable Diffusion 1 with the published models' norm groups and heads, which no file has to name."""
    encoders = (replace(CLIP_L, heads=1),)
    shape = replace(SHAPES["sd1"], encoders=encoders, autoencoder_widths=(32, 32, 64, 64), groups=32)
    return make_tiny_stable_diffusion(folder, "sd1", layout, seed=5, shape=shape)
