"""Stable Diffusion XL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, small_lora


def make_sdxl(folder: Path) -> Path:
    """The single file of a random tiny model under the real file's key names, with its tokenizers beside it."""
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    return make_tiny_stable_diffusion(folder, "sdxl")


def sdxl_options(files: Any) -> list[object]:
    """One file holds everything."""
    return ["--pretrained_model_name_or_path", files, *small_lora("networks.lora")]


SDXL = Family(
    name="sdxl",
    make=make_sdxl,
    command=sdxl_options,
    idle="--ddp_static_graph",
    caches=("_sdxl.npz", "_te_outputs.npz"),
)
