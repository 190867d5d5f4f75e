"""Lumina Image 2.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, dtype_options, small_lora


def make_lumina(folder: Path) -> Any:
    """A random tiny Lumina Image 2.0."""
    from tools.make_tiny_models import make_tiny_lumina

    return make_tiny_lumina(folder)


def lumina_options(files: Any) -> list[object]:
    """A transformer, a text encoder and an autoencoder, with the settings that are recommended."""
    return [
        *("--pretrained_model_name_or_path", files.transformer, "--gemma2", files.gemma2, "--ae", files.autoencoder),
        *small_lora("networks.lora_lumina"),
        *("--timestep_sampling", "nextdit_shift", "--gemma2_max_token_length", "32"),
        *("--system_prompt", "You are an assistant."),
    ]


def lumina_drawing(files: Any) -> list[object]:
    """The same files for lumina_minimal_inference.py."""
    return [
        *("--pretrained_model_name_or_path", files.transformer, "--gemma2_path", files.gemma2),
        *("--ae_path", files.autoencoder, "--gemma2_max_token_length", "32"),
        *("--system_prompt", "You are an assistant."),
    ]


LUMINA = Family(
    name="lumina",
    make=make_lumina,
    command=lumina_options,
    idle="--clip_skip 2",
    caches=("_lumina.npz", "_lumina_te.npz"),
    planned="--optimizer_type AdamW8bit --network_args module_dropout=0.2",
    drawing=lumina_drawing,
    dtypes=dtype_options("--dtype", "--gemma2_dtype", "--ae_dtype"),
)
