"""Training on a base model in each storage format, as a user asks for it: options, what comes out, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.memory import formats
from library.memory.storage import Storage, block_linears
from library.memory.stored_linear import StoredLinear
from library.models.flux.checkpoint import open_transformer
from tests.running import no_weights_are_read, run_in_process, train

OPTIONS = {
    "--fp8_base_unet": Storage("fp8"),
    "--fp8_scaled": Storage("fp8", "block"),
    "--fp8_scaled --fp8_scaled_granularity tensor": Storage("fp8"),
    "--fp8_scaled --fp8_scaled_granularity channel": Storage("fp8", "channel"),
    "--base_format int8": Storage("int8"),
    "--base_format nf4": Storage("nf4"),
}
CACHED = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")


@pytest.fixture
def given(flux_command, dataset_toml) -> list[object]:
    """A command line of four steps in bfloat16, on cached images and captions, but for the output folder."""
    words = [*flux_command, *CACHED, "--mixed_precision", "bf16", "--dataset_config", dataset_toml()]
    return [*words, "--seed", "3", "--max_train_steps", "4", "--max_data_loader_n_workers", "0", "--no_report"]


@pytest.fixture
def rounded(tiny_flux, tmp_path):
    """A file of the transformer whose numbers are what a format makes of the original's."""

    def make(storage: Storage) -> Path:
        state = load_file(tiny_flux.transformer)
        for name in block_linears(open_transformer(tiny_flux.transformer).meta_module()):
            weight = formats.quantise(state[f"{name}.weight"], storage).to(torch.bfloat16)
            state[f"{name}.weight"] = weight.float()
        save_file(state, tmp_path / "rounded.safetensors")
        return tmp_path / "rounded.safetensors"

    return make


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.any() for name, tensor in one.items() if name.endswith("lora_up.weight"))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_lora_is_to_the_bit_that_of_the_rounded_weights(given, rounded, tmp_path, options):
    """With gradient checkpointing, accumulation and sample images; the optimizer is one that sees gradients' sizes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    learning = ["--optimizer_type", "SGD", "--learning_rate", "1", "--gradient_checkpointing"]
    learning += ["--gradient_accumulation_steps", "2", "--sample_every_n_steps", "4", "--sample_prompts", prompts]
    trainer = train("flux", *given, *learning, *options.split(), "--output_dir", tmp_path / "stored")
    layers = [layer for layer in trainer.pipeline.load_transformer().modules() if isinstance(layer, StoredLinear)]
    assert len(layers) > 10
    plain = [*given, *learning, "--output_dir", tmp_path / "plain"]
    plain[plain.index("--pretrained_model_name_or_path") + 1] = rounded(OPTIONS[options])
    train("flux", *plain)
    assert_equal(lora(tmp_path / "stored"), lora(tmp_path / "plain"))
    images = [next((tmp_path / name / "sample").glob("*.png")).read_bytes() for name in ("stored", "plain")]
    assert len(images[0]) > 0
