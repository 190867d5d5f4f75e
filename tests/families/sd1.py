"""Stable Diffusion 1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, small_lora


def make_sd1(folder: Path) -> Path:
    """The single file of a random tiny model under the real file's key names, with its tokenizers beside it."""
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    return make_tiny_stable_diffusion(folder, "sd1")


def sd1_options(files: Any) -> list[object]:
    """One file holds everything."""
    return ["--pretrained_model_name_or_path", files, *small_lora("networks.lora")]


SD1 = Family(
    name="sd1",
    make=make_sd1,
    command=sd1_options,
    idle="--ddp_static_graph",
    caches=("_sd.npz", "_sd_te.npz"),
)
