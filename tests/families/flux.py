"""FLUX.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, small_lora


def make_flux(folder: Path) -> Any:
    """A random tiny FLUX.1 dev."""
    from tools.make_tiny_models import make_tiny_flux

    return make_tiny_flux(folder)


def flux_options(files: Any) -> list[object]:
    """A transformer, two text encoders and an autoencoder, with the settings that are recommended for FLUX.1."""
    return [
        *("--pretrained_model_name_or_path", files.transformer, "--clip_l", files.clip_l),
        *("--t5xxl", files.t5xxl, "--ae", files.autoencoder),
        *small_lora("networks.lora_flux"),
        *("--timestep_sampling", "flux_shift", "--model_prediction_type", "raw", "--guidance_scale", "1.0"),
        *("--t5xxl_max_token_length", "16"),
    ]


def flux_drawing(files: Any) -> list[object]:
    """The same files for flux_minimal_inference.py."""
    return [
        *("--ckpt_path", files.transformer, "--clip_l", files.clip_l, "--t5xxl", files.t5xxl),
        *("--ae", files.autoencoder, "--t5xxl_max_token_length", "16"),
    ]


FLUX = Family(
    name="flux",
    make=make_flux,
    command=flux_options,
    idle="--clip_skip 2",
    caches=("_flux.npz", "_flux_te.npz"),
    planned="--optimizer_type AdamW8bit --network_args train_t5xxl=True module_dropout=0.2",
    drawing=flux_drawing,
)
