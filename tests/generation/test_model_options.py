"""Which model is opened, and how it computes: --ckpt and the options beside it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.generation.model_options import ModelOptions, open_model
from library.generation.text_options import TextOptions
from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

CPU = torch.device("cpu")


def opened(text: TextOptions | None = None, **options: Any) -> StableDiffusionPipeline:
    return open_model(ModelOptions(**options), text or TextOptions(), CPU)


# ---- which model ----------------------------------------------------------------------------------------------------


def test_the_kind_of_model_is_recognised(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl):
    models = [opened(ckpt=str(path)) for path in (few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl)]
    assert [model.variant for model in models] == ["sd1", "sd2", "sdxl"]


@pytest.mark.parametrize("option", ["v2", "sdxl"])
def test_an_option_for_another_kind_of_model_is_named_and_has_no_effect(few_blocks_sd1, caplog, option):
    """--v1, --v2, --sdxl."""
    assert opened(ckpt=str(few_blocks_sd1), **{option: True}).variant == "sd1"
    assert f"--{option} has no effect: {few_blocks_sd1} is a Stable Diffusion 1.x model" in caplog.text


def test_the_option_of_its_own_kind_is_silent(few_blocks_sd1, caplog):
    opened(ckpt=str(few_blocks_sd1), v1=True)
    assert "no effect" not in caplog.text


def test_a_pattern_that_one_file_matches_names_it(few_blocks_sd1, tmp_path):
    (tmp_path / "my-model.safetensors").symlink_to(few_blocks_sd1)
    assert opened(ckpt=str(tmp_path / "my-*.safetensors")).model.unet.source.checkpoint.path == few_blocks_sd1.resolve()
    shutil.copy(few_blocks_sd1, tmp_path / "my-other.safetensors")
    with pytest.raises(UserError, match=r"^--ckpt: .*my-\*.safetensors matches 2 files .*; name one of them"):
        opened(ckpt=str(tmp_path / "my-*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckpt": None}, "^--ckpt is missing"),
        ({"v1": True, "sdxl": True}, "^--v1 and --sdxl cannot be used together"),
        ({"fp16": True, "bf16": True}, "^--fp16 and --bf16 cannot be used together"),
        ({"vae_slices": 0}, "^--vae_slices must be at least 1, not 0"),
        ({"vae_batch_size": 0.0}, "^--vae_batch_size must be above 0, not 0"),
        ({"ckpt": "nothing.safetensors"}, "^--ckpt: nothing.safetensors does not exist"),
        ({"vae": "nothing.pt"}, "^--vae: nothing.pt does not exist"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(few_blocks_sd1, options, message):
    with pytest.raises(UserError, match=message):
        opened(**{"ckpt": str(few_blocks_sd1), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_embeddings_multiples": 0}, "^--max_embeddings_multiples must be at least 1, not 0"),
        ({"clip_skip": 0}, "^--clip_skip must be between 1 and 2"),
        ({"clip_skip": 3}, "^--clip_skip must be between 1 and 2"),
    ],
)
def test_text_options_that_cannot_be_are_one_sentence(few_blocks_sd1, few_blocks_sdxl, options, message):
    for path in (few_blocks_sd1, few_blocks_sdxl):
        with pytest.raises(UserError, match=message):
            opened(TextOptions(**options), ckpt=str(path))
