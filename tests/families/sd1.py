"""Stable Diffusion 1.5."""

from __future__ import annotations

from tests.families.stable_diffusion import stable_diffusion

SD1 = stable_diffusion("sd1", ("_sd.npz", "_sd_te.npz"), "--network_args conv_dim=4")
