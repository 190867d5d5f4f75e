"""Stable Diffusion XL."""

from __future__ import annotations

from tests.families.stable_diffusion import stable_diffusion

SDXL = stable_diffusion(
    "sdxl",
    ("_sdxl.npz", "_te_outputs.npz"),
    "--cache_text_encoder_outputs --network_train_unet_only --gradient_checkpointing --mixed_precision bf16"
    " --full_bf16",
)
