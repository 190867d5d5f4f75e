"""Chroma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, small_lora


def make_chroma(folder: Path) -> Any:
    """A random tiny Chroma."""
    from tools.make_tiny_models import make_tiny_chroma

    return make_tiny_chroma(folder)


def chroma_options(files: Any) -> list[object]:
    """One text encoder, and the settings that are recommended for Chroma."""
    return [
        *("--model_type", "chroma", "--pretrained_model_name_or_path", files.transformer),
        *("--t5xxl", files.t5xxl, "--ae", files.autoencoder, "--apply_t5_attn_mask"),
        *small_lora("networks.lora_flux"),
        *("--timestep_sampling", "sigmoid", "--model_prediction_type", "raw", "--guidance_scale", "0.0"),
        *("--t5xxl_max_token_length", "16"),
    ]


def chroma_drawing(files: Any) -> list[object]:
    """The same files for flux_minimal_inference.py."""
    return [
        *("--model_type", "chroma", "--ckpt_path", files.transformer, "--t5xxl", files.t5xxl),
        *("--ae", files.autoencoder, "--t5xxl_max_token_length", "16"),
    ]


CHROMA = Family(
    name="chroma",
    make=make_chroma,
    command=chroma_options,
    idle="--clip_skip 2",
    caches=("_flux.npz", "_flux_te.npz"),
    planned="--cache_latents_to_disk --cache_text_encoder_outputs_to_disk",
    drawing=chroma_drawing,
)
