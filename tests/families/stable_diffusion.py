"""Models of Stable Diffusion's families with few blocks, so that many runs of them take little time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.models.stable_diffusion.checkpoint import Variant
    from tools.make_tiny_stable_diffusion import Layout


def make_few_blocks(folder: Path, variant: Variant, layout: Layout = "original") -> Path:
    """A random tiny model in one of the real models' layouts; returns what names it to the scripts.

    It has two of the real model's levels; tests of the blocks themselves use the models of
    ``tools/make_tiny_stable_diffusion.py``, which have all of them.
    """
    from tools.make_tiny_stable_diffusion import SHAPES, make_tiny_stable_diffusion

    full = SHAPES[variant]
    shape = replace(
        full,
        widths=full.widths[:2],
        depths=(0, 1) if variant == "sdxl" else (1, 1),
        heads=full.heads if isinstance(full.heads, int) else full.heads[:2],
        encoders=tuple(replace(encoder, layers=2) for encoder in full.encoders),
        resnets=2 if variant == "sdxl" else 1,  # XL is recognised by its input block 4
        autoencoder_widths=(8, 16, 16, 16),
        autoencoder_resnets=1,
    )
    return make_tiny_stable_diffusion(folder, variant, layout, shape=shape)
