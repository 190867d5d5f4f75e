"""What the quick start (``tools/quickstart.py``) does for each family of models, as one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLUX = ROOT / "assets" / "tiny_flux"
CHROMA = ROOT / "assets" / "tiny_chroma"
LUMINA = ROOT / "assets" / "tiny_lumina"
HUNYUAN_IMAGE = ROOT / "assets" / "tiny_hunyuan_image"
SD15 = ROOT / "assets" / "tiny_sd15"


@dataclass(frozen=True)
class Family:
    """What the quick start does differently for one family of models."""

    script: str
    network_module: str
    files: dict[str, Path]
    """The files of the tiny model by the options that name them."""
    preset: str
    """The beginning of the names of the real model's files in ``configs/``."""
    settings: dict[str, object]
    """Further training options, as the family's guide recommends them."""
    samples: str
    """Options of a sample prompt: how it is guided."""
    steps: int = 600
    flags: tuple[str, ...] = ("cache_text_encoder_outputs",)
    only_tiny: dict[str, object] = field(default_factory=dict)
    """Options that the real model does without."""
    drawn_by: str | None = None
    """The script that generates the images before and after the training; None: the training does."""


FAMILIES = {
    "flux": Family(
        script="flux_train_network.py",
        network_module="networks.lora_flux",
        files={
            "pretrained_model_name_or_path": FLUX / "flux1-tiny.safetensors",
            "clip_l": FLUX / "clip_l.safetensors",
            "t5xxl": FLUX / "t5xxl.safetensors",
            "ae": FLUX / "ae.safetensors",
        },
        preset="flux",
        settings={
            "learning_rate": 2e-3,
            "guidance_scale": 1.0,
            "timestep_sampling": "sigmoid",
            "model_prediction_type": "raw",
        },
        samples="--l 1.0 --g 1.0",
        only_tiny={"tokenizer_cache_dir": FLUX / "tokenizers", "t5xxl_max_token_length": 16},
    ),
    "chroma": Family(
        script="flux_train_network.py",
        network_module="networks.lora_flux",
        files={
            "pretrained_model_name_or_path": CHROMA / "chroma-tiny.safetensors",
            "t5xxl": CHROMA / "t5xxl.safetensors",
            "ae": FLUX / "ae.safetensors",
        },
        preset="chroma",
        settings={
            "model_type": "chroma",
            "learning_rate": 4e-3,
            "guidance_scale": 0.0,
            "timestep_sampling": "sigmoid",
            "model_prediction_type": "raw",
        },
        samples="--n small --l 2.0 --g 0.0",
        flags=("cache_text_encoder_outputs", "apply_t5_attn_mask"),
        only_tiny={"tokenizer_cache_dir": FLUX / "tokenizers", "t5xxl_max_token_length": 16},
    ),
    "lumina": Family(
        script="lumina_train_network.py",
        network_module="networks.lora_lumina",
        files={
            "pretrained_model_name_or_path": LUMINA / "lumina-tiny.safetensors",
            "gemma2": LUMINA / "gemma2.safetensors",
            "ae": FLUX / "ae.safetensors",
        },
        preset="lumina",
        settings={
            "learning_rate": 4e-3,
            "timestep_sampling": "nextdit_shift",
            "model_prediction_type": "raw",
            "discrete_flow_shift": 6.0,
            "system_prompt": "You are an assistant designed to generate high-quality images based on user prompts.",
        },
        samples="--l 3.5",
        steps=200,
    ),
    "hunyuan_image": Family(
        script="hunyuan_image_train_network.py",
        network_module="networks.lora_hunyuan_image",
        files={
            "pretrained_model_name_or_path": HUNYUAN_IMAGE / "hunyuan-image-tiny.safetensors",
            "text_encoder": HUNYUAN_IMAGE / "qwen_2.5_vl.safetensors",
            "byt5": HUNYUAN_IMAGE / "byt5_glyph.safetensors",
            "vae": HUNYUAN_IMAGE / "vae.safetensors",
        },
        preset="hunyuan_image",
        settings={"learning_rate": 4e-3, "model_prediction_type": "raw", "discrete_flow_shift": 5.0},
        samples="--l 1.0",
        steps=300,
    ),
    "sd15": Family(
        script="train_network.py",
        network_module="networks.lora",
        files={"pretrained_model_name_or_path": SD15 / "sd15-tiny.safetensors"},
        preset="sd1",
        settings={
            "learning_rate": 8e-3,
            "network_args": ("conv_dim=16", "conv_alpha=16"),
        },
        samples="--l 3.0",
        steps=400,
        flags=("debiased_estimation_loss",),
        drawn_by="gen_img.py",
    ),
}
