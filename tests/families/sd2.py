"""Stable Diffusion 2.1, which predicts v."""

from __future__ import annotations

from tests.families.stable_diffusion import stable_diffusion

SD2 = stable_diffusion(
    "sd2", ("_sd.npz", "_sd_te.npz"), "--cache_latents --network_train_unet_only", "--v2", "--v_parameterization"
)
