"""What several tests of the studio begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.families import by_key
from library.studio.settings_files import settings_text
from tests.running import ROOT

FLUX = by_key("flux")
TINY = ROOT / "assets" / "tiny_flux"


@pytest.fixture
def tiny_job(tmp_path, image_folder):
    """The file of a job for the quick start's tiny FLUX.1."""

    def write(**more: object) -> Path:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a circle --w 64 --h 64 --s 1\n", encoding="utf-8")
        values = {
            "pretrained_model_name_or_path": str(TINY / "flux1-tiny.safetensors"),
            **{name: str(TINY / f"{name}.safetensors") for name in ("clip_l", "t5xxl", "ae")},
            "tokenizer_cache_dir": str(TINY / "tokenizers"),
            "t5xxl_max_token_length": 16,
            "output_dir": str(tmp_path / "out"),
            "output_name": "lora",
            "network_module": FLUX.networks[0],
            "network_dim": 2,
            "cache_latents": True,
            "cache_text_encoder_outputs": True,
            "network_train_unet_only": True,
            "sample_prompts": str(prompts),
            "sample_at_first": True,
            "max_train_steps": 400,
            "save_state": True,
            "seed": 3,
            **more,
        }
        path = tmp_path / "given.toml"
        path.write_text(settings_text(FLUX.file, values), encoding="utf-8")
        return path

    return write
