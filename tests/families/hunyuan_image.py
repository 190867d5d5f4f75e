"""HunyuanImage-2.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.family import Family, small_lora


def make_hunyuan_image(folder: Path) -> Any:
    """A random tiny HunyuanImage-2.1."""
    from tools.make_tiny_models import make_tiny_hunyuan_image

    return make_tiny_hunyuan_image(folder)


def hunyuan_image_options(files: Any) -> list[object]:
    """A transformer, two text encoders and an autoencoder."""
    return [
        *("--pretrained_model_name_or_path", files.transformer, "--text_encoder", files.text_encoder),
        *("--byt5", files.byt5, "--vae", files.autoencoder),
        *small_lora("networks.lora_hunyuan_image"),
        "--network_train_unet_only",
    ]


def hunyuan_image_drawing(files: Any) -> list[object]:
    """The same files for hunyuan_image_minimal_inference.py."""
    return [
        *("--dit", files.transformer, "--text_encoder", files.text_encoder, "--byt5", files.byt5),
        *("--vae", files.autoencoder),
    ]


HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    make=make_hunyuan_image,
    command=hunyuan_image_options,
    idle="--clip_skip 2",
    caches=("_hi.npz", "_hi_te.npz"),
    planned="--optimizer_type AdamW8bit --network_args module_dropout=0.2",
    drawing=hunyuan_image_drawing,
    lora_option=("--lora_weight",),
    output_option="--save_path",
    guidance="--l",
)
