"""A tiny model with the constants of the published ones, for files that cannot say otherwise, such as pickles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from tools import make_tiny_stable_diffusion as make_tiny


def make_published(folder: Path, layout: Literal["original", "diffusers"] = "original") -> Path:
    """A tiny Stable Diffusion 1 with the published models' norm groups and heads, which no file has to name."""
    shape = make_tiny.SHAPES["sd1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_tiny, "GROUPS", 32)
        patch.setattr(make_tiny, "AUTOENCODER_WIDTHS", (32, 32, 64, 64))
        patch.setitem(make_tiny.SHAPES, "sd1", replace(shape, encoders=(replace(make_tiny.CLIP_L, heads=1),)))
        return make_tiny.make_tiny_stable_diffusion(folder, "sd1", layout, seed=5)
