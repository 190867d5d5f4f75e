"""Stable Diffusion 2.1, which predicts v."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, small_lora


def make_sd2(folder: Path) -> Path:
    """The single file of a random tiny model under the real file's key names, with its tokenizers beside it."""
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    return make_tiny_stable_diffusion(folder, "sd2")


def sd2_options(files: Any) -> list[object]:
    """One file holds everything."""
    return ["--pretrained_model_name_or_path", files, *small_lora("networks.lora"), "--v2", "--v_parameterization"]


SD2 = Family(
    name="sd2",
    make=make_sd2,
    command=sd2_options,
    idle="--ddp_static_graph",
    caches=("_sd.npz", "_sd_te.npz"),
)
