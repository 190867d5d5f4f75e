"""The Stable Diffusion scripts as users run them; other programs read what they write."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.families.families import TINY
from tests.families.stable_diffusion import make_few_blocks
from tests.running import run_in_process

REFERENCE = Path(__file__).parents[1] / "reference_data"
PROMPT = "a circle, number 3, on a background"

# What differs between any two runs, or between our tiny model and the recorded one.
DIFFERENT = """
    modelspec.date modelspec.implementation_version ss_sd_scripts_commit_hash ss_session_id ss_training_started_at
    ss_training_finished_at sshs_model_hash sshs_legacy_hash ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash
    ss_datasets ss_tag_frequency ss_dataset_dirs ss_num_train_images ss_num_batches_per_epoch ss_max_train_steps
    ss_steps ss_num_epochs ss_epoch
""".split()


@pytest.fixture(params=["sd1", *(pytest.param(variant, marks=pytest.mark.thorough) for variant in ("sd2", "sdxl"))])
def variant(request):
    return request.param


@pytest.mark.slow
def test_a_run_makes_a_file_that_diffusers_uses_as_we_do(request, variant, dataset_toml, tmp_path, caplog):
    # The names were recorded with a model that has all blocks.
    model = request.getfixturevalue("tiny_sd1" if variant == "sd1" else f"few_blocks_{variant}")
    result = run_in_process(
        TINY[variant].script,
        *(*TINY[variant].command(model), "--max_train_steps", "3", "--network_alpha", "2", "--seed", "42"),
        *("--cache_latents", "--output_name", "sd15", "--no_report", "--learning_rate", "1e-3"),
        *("--dataset_config", dataset_toml(resolution=64, bucket_reso_steps=64), "--output_dir", tmp_path),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    path = tmp_path / "sd15.safetensors"
    tensors = load_file(path)
    moved = {key.split(".")[0] for key, tensor in tensors.items() if "lora_up" in key and tensor.any()}
    # The last layers of SDXL's CLIP-L reach nothing: its last but one is taken.
    prefixes = ("lora_unet_", "lora_te1_", "lora_te2_") if variant == "sdxl" else ("lora_unet_", "lora_te_")
    assert all(any(key.startswith(prefix) for key in moved) for prefix in prefixes)
    if variant == "sd1":
        assert_recorded_names_and_metadata(path)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        theirs, layers = prediction_of_diffusers(variant, path, tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "key" in text.lower() or "LoRA" in text]
    assert layers == sum(key.endswith("lora_down.weight") for key in tensors)
    torch.testing.assert_close(theirs, our_prediction(variant, model, path), rtol=1e-4, atol=1e-4)


def assert_recorded_names_and_metadata(path: Path) -> None:
    """Against the file that kohya-ss/sd-scripts wrote for a tiny model with two layers of text."""
    names = json.loads((REFERENCE / "lora_sd15_keys.json").read_text(encoding="utf-8"))
    recorded = json.loads((REFERENCE / "lora_sd15_metadata.json").read_text(encoding="utf-8"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        ours = {key: file.get_slice(key) for key in file.keys() if "_layers_2_" not in key}  # noqa: SIM118
        kinds = {key: (len(part.get_shape()), part.get_dtype()) for key, part in ours.items()}
    assert kinds == {key: (len(shape), dtype) for key, (shape, dtype) in names.items()}
    assert metadata.keys() == recorded.keys()
    assert {key: value for key, value in metadata.items() if value != recorded[key] and key not in DIFFERENT} == {}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300])


def our_prediction(variant: str, model: Path, lora: Path) -> torch.Tensor:
    from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline, time_ids
    from networks.lora import create_network_from_weights

    pipeline = StableDiffusionPipeline(StableDiffusionFiles(model), torch.float32, "cpu")
    encoders, unet = pipeline.load_text_encoders(), pipeline.load_transformer()
    network, _ = create_network_from_weights(1.0, lora, None, encoders if len(encoders) > 1 else encoders[0], unet)
    with torch.no_grad():
        plain = pipeline.predict(*inputs(), conditioning_of(pipeline, time_ids))
        network.apply_to(encoders, unet)
        drawn = pipeline.predict(*inputs(), conditioning_of(pipeline, time_ids))
    assert (drawn - plain).abs().max() > 5e-4
    return drawn


def conditioning_of(pipeline, time_ids) -> dict[str, torch.Tensor]:
    sizes = {"time_ids": time_ids((64, 64), (0, 0), (64, 64))} if pipeline.variant == "sdxl" else {}
    return {**pipeline.encode_prompts([PROMPT]), **sizes}


def prediction_of_diffusers(variant: str, lora: Path, folder: Path) -> tuple[torch.Tensor, int]:
    """What diffusers' own pipeline of the same model predicts with the file, and how many layers it put it into."""
    from diffusers import DiffusionPipeline

    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    make = make_tiny_stable_diffusion if variant == "sd1" else make_few_blocks
    make(folder / "diffusers", variant, "diffusers")
    pipe = DiffusionPipeline.from_pretrained(folder / "diffusers")
    pipe.load_lora_weights(lora)
    latents, timesteps = inputs()
    with torch.no_grad():
        encoded = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        added = None
        if variant == "sdxl":
            sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
            added = {"text_embeds": encoded[2], "time_ids": sizes}
        prediction = pipe.unet(latents, timesteps, encoded[0], added_cond_kwargs=added).sample
    models = [pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    layers = sum(hasattr(module, "lora_A") for model in models if model is not None for module in model.modules())
    return prediction, layers
