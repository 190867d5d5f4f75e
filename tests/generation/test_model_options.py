"""Which model is opened, and how it computes: --ckpt and the options beside it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors import safe_open

from library.errors import UserError
from library.generation.model_options import ModelOptions, open_model
from library.generation.text_options import TextOptions
from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
from library.safetensors_io import save_file
from tests.families.stable_diffusion import make_few_blocks

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
    shutil.copytree(few_blocks_sd1.parent / "tokenizer", tmp_path / "tokenizer")
    model = opened(ckpt=str(tmp_path / "my-*.safetensors")).model.unet.source.checkpoint.path
    assert model == tmp_path / "my-model.safetensors"
    shutil.copy(few_blocks_sd1, tmp_path / "my-other.safetensors")
    with pytest.raises(UserError, match=r"^--ckpt: .*my-\*.safetensors matches 2 files .*; name one of them"):
        opened(ckpt=str(tmp_path / "my-*.safetensors"))


def test_tokenizers_come_from_tokenizer_cache_dir_first(few_blocks_sd1, tmp_path):
    """--tokenizer_cache_dir: a folder named after the tokenizer's id on the hub."""
    shutil.copytree(few_blocks_sd1.parent / "tokenizer", tmp_path / "cache" / "openai_clip-vit-large-patch14")
    model = shutil.copy(few_blocks_sd1, tmp_path / "model.safetensors")
    ours = opened(ckpt=str(model), tokenizer_cache_dir=str(tmp_path / "cache")).tokenizer("text_encoder")
    assert ours.get_vocab() == opened(ckpt=str(few_blocks_sd1)).tokenizer("text_encoder").get_vocab()


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


# ---- what its files say ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def says(few_blocks_sd1, tmp_path_factory):
    """A copy of the model whose metadata or keys say how it was trained."""
    with safe_open(few_blocks_sd1, "pt") as file:
        keys = list(file.keys())
        tensors = {key: file.get_tensor(key) for key in keys}
        metadata = file.metadata()
    folder = tmp_path_factory.mktemp("says")
    shutil.copytree(few_blocks_sd1.parent / "tokenizer", folder / "tokenizer")

    def make(name: str, *keys: str, **more: str):
        path = folder / f"{name}.safetensors"
        save_file(tensors | {key: torch.ones(1) for key in keys}, path, {**metadata, **more})
        return str(path)

    return make


def test_what_the_files_say_of_the_prediction_counts(says, few_blocks_sd1, caplog):
    """--v_parameterization and --zero_terminal_snr."""
    v = opened(ckpt=says("v", "v_pred", "ztsnr"))
    assert v.v_parameterization and v.zero_terminal_snr
    assert "predicts v: --v_parameterization is taken as given" in caplog.text
    assert "--zero_terminal_snr is taken as given" in caplog.text
    caplog.clear()
    path = says("noise", **{"modelspec.prediction_type": "epsilon"})
    noise = opened(ckpt=path, v_parameterization=True, zero_terminal_snr=True)
    assert not noise.v_parameterization and noise.zero_terminal_snr
    assert f"--v_parameterization has no effect: {path} says that it predicts noise" in caplog.text
    caplog.clear()
    unsaid = [opened(ckpt=str(few_blocks_sd1), v_parameterization=given) for given in (True, False)]
    assert [model.v_parameterization for model in unsaid] == [True, False]
    assert "parameterization" not in caplog.text


# ---- how it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("v1", torch.float32)]
)
def test_parts_are_in_the_dtype_that_is_named_and_the_autoencoder_in_float32_on_request(few_blocks_sd1, option, dtype):
    """--fp16, --bf16, --no_half_vae."""
    for no_half_vae in (False, True):
        model = opened(ckpt=str(few_blocks_sd1), no_half_vae=no_half_vae, **{option: True})
        dtypes = {part: next(model.load(part).parameters()).dtype for part in model.parts}
        vae = torch.float32 if no_half_vae else dtype
        assert dtypes == {"unet": dtype, "text_encoder": dtype, "autoencoder": vae}


def test_missing_xformers_is_said_and_torch_takes_its_place(few_blocks_sd1, caplog, monkeypatch):
    """--xformers, --diffusers_xformers, --sdpa."""
    from library.models import attention

    monkeypatch.setattr(attention, "PACKAGES", {"xformers": "no_such_package"})
    for option in ("xformers", "diffusers_xformers"):
        caplog.clear()
        assert opened(ckpt=str(few_blocks_sd1), **{option: True}).attention_backend == "sdpa"
        assert f"--{option}: the package no_such_package is not installed" in caplog.text
    monkeypatch.setattr(attention, "PACKAGES", {"xformers": "torch"})
    for option in ("xformers", "diffusers_xformers"):
        assert opened(ckpt=str(few_blocks_sd1), **{option: True}).attention_backend == "xformers"
    assert opened(ckpt=str(few_blocks_sd1), sdpa=True).attention_backend == "sdpa"


def test_channels_last_changes_the_memory_format_and_not_the_image(few_blocks_sd1):
    """--opt_channels_last."""
    plain, changed = (opened(ckpt=str(few_blocks_sd1), opt_channels_last=given) for given in (False, True))
    request = plain.request_class("a cat", width=64, height=64, seed=1, sample_steps=2)
    images = []
    for model in (plain, changed):
        latents = model.generate_latents(request)
        images.append(model.decode_latents(latents))
        for part in ("unet", "autoencoder"):
            weights = [w for w in model.load(part).parameters() if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
            assert all(w.is_contiguous(memory_format=torch.channels_last) == (model is changed) for w in weights)
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)


def test_another_autoencoder_takes_the_place_of_the_models_own(few_blocks_sd1, tmp_path):
    """--vae; test_stable_diffusion_checkpoints.py reads every layout of it."""
    other = make_few_blocks(tmp_path, "sd1", "diffusers", seed=7)
    own, replaced = opened(ckpt=str(few_blocks_sd1)), opened(ckpt=str(few_blocks_sd1), vae=str(other / "vae"))
    expected = opened(ckpt=str(other)).load("autoencoder").state_dict()
    weights = replaced.load("autoencoder").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert torch.equal(own.load("unet").conv_in.weight, replaced.load("unet").conv_in.weight)
