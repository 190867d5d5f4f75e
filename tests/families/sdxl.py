"""Stable Diffusion XL."""

from __future__ import annotations

from tests.families.stable_diffusion import stable_diffusion

SDXL = stable_diffusion("sdxl", ("_sdxl.npz", "_te_outputs.npz"))
