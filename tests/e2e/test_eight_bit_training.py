"""Training on models in 8 bits, as a user asks for it: files, options, combinations, and what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.errors import UserError
from library.memory.scaled import FP8, ScaledLinear, quantise
from library.options import parse_options
from tests.running import forget_accelerator, run_in_process

LEARNING = ["--learning_rate", "1e-2", "--text_encoder_lr", "1e-2", "--network_args", "train_t5xxl=True"]


@pytest.fixture
def command(tiny_flux, flux_command, dataset_toml, tmp_path):
    """A command line of two steps into ``output``, on the transformer and the T5 given."""

    def make(output: str, *arguments: object, **files: object) -> list[str]:
        given = [*flux_command, "--max_train_steps", 2, "--output_dir", tmp_path / output, "--mixed_precision", "bf16"]
        given += ["--dataset_config", dataset_toml(), "--max_data_loader_n_workers", "0"]
        given += arguments
        for name in ("tokenizer", "tokenizer_2"):  # beside the files that the tests write
            shutil.copytree(Path(tiny_flux.t5xxl).parent / name, tmp_path / name, dirs_exist_ok=True)
        for name, path in files.items():
            given[given.index(f"--{name}") + 1] = path
        return [str(value) for value in given]

    return make


@pytest.fixture
def trainer(command):
    """The trainer of such a command line, not yet started."""

    def make(*arguments: object, output: str = "out", **files: object) -> FluxNetworkTrainer:
        forget_accelerator()
        return FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", command(output, *arguments, **files)))

    return make


@pytest.fixture
def eighth(tiny_flux, tmp_path):
    """T5 cast to e4m3fn, and a transformer in scaled e4m3fn under ComfyUI's names; both also as their numbers."""
    t5 = {name: value.to(FP8) for name, value in load_file(tiny_flux.t5xxl).items()}
    scaled, numbers = load_file(tiny_flux.transformer), load_file(tiny_flux.transformer)
    for name, value in numbers.items():
        if name.endswith(".weight") and value.dim() == 2:
            stored = quantise(value)
            scaled[name], scaled[name.removesuffix("weight") + "scale_weight"] = stored.codes, stored.scale
            numbers[name] = stored.to(torch.float32)
    scaled["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    states = {"t5_8": t5, "flux_8": scaled, "t5": {name: value.float() for name, value in t5.items()}, "flux": numbers}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return {name: tmp_path / f"{name}.safetensors" for name in states}


def layers_in_8_bits(module: torch.nn.Module) -> dict[str, ScaledLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, ScaledLinear)}


def test_text_encoders_train_over_files_in_8_bits_as_over_their_numbers(command, trainer, eighth, tmp_path):
    """CLIP-L's and T5's LoRA too. Once from the command line with the 8-bit files, once with ordinary ones."""
    files = {"pretrained_model_name_or_path": eighth["flux_8"], "t5xxl": eighth["t5_8"]}
    run = run_in_process("flux_train_network.py", *command("kept", "--fp8_base", *LEARNING, **files))
    assert run.returncode == 0, run.stderr
    trainer(*LEARNING, pretrained_model_name_or_path=eighth["flux"], t5xxl=eighth["t5"], output="plain").train()
    kept, plain = (load_file(tmp_path / name / "last.safetensors") for name in ("kept", "plain"))
    assert kept.keys() == plain.keys()
    ups = [name for name in kept if name.endswith("lora_up.weight")]
    assert {name.split("_")[1] for name in ups if kept[name].any()} == {"unet", "te1", "te3"}
    # AdamW's first steps are as long as the rate, whatever the gradient's size: what is compared is their direction.
    same = torch.cat([(kept[name].sign() == plain[name].sign()).flatten() for name in ups])
    assert same.float().mean() > 0.95


def test_files_in_8_bits_stay_so_in_memory(trainer, eighth):
    run = trainer("--fp8_base", pretrained_model_name_or_path=eighth["flux_8"], t5xxl=eighth["t5_8"])
    run.train()
    stored, t5 = load_file(eighth["flux_8"]), load_file(eighth["t5_8"])
    for name, layer in layers_in_8_bits(run.pipeline.load_transformer()).items():
        assert torch.equal(layer.codes.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        assert torch.equal(layer.scale, stored[f"{name}.scale_weight"])
    encoder = run.pipeline.modules["t5xxl"]
    for name, layer in layers_in_8_bits(encoder).items():
        assert torch.equal(layer.codes.view(torch.uint8), t5[f"{name}.weight"].view(torch.uint8))
        assert layer.scale == 1
    assert len(layers_in_8_bits(encoder)) == 14


def test_with_fp8_base_unet_text_encoders_are_in_the_training_format(trainer, eighth):
    run = trainer("--fp8_base_unet", pretrained_model_name_or_path=eighth["flux_8"], t5xxl=eighth["t5_8"])
    run.train()
    assert layers_in_8_bits(run.pipeline.load_transformer())
    for encoder in ("clip_l", "t5xxl"):
        assert not layers_in_8_bits(run.pipeline.modules[encoder])
        assert {p.dtype for p in run.pipeline.modules[encoder].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["pretrained_model_name_or_path", "t5xxl", "clip_l"])
@pytest.mark.parametrize("name", ["float8_e5m2", pytest.param("float8_e4m3fnuz", marks=pytest.mark.thorough)])
def test_other_8_bit_formats_are_named_before_anything_is_loaded(trainer, tiny_flux, tmp_path, part, name):
    from library.safetensors_io import save_file

    path = getattr(tiny_flux, "transformer" if part.startswith("pre") else part)
    state = {
        key: value.to(getattr(torch, name)) if value.dim() == 2 else value for key, value in load_file(path).items()
    }
    save_file(state, tmp_path / "other.safetensors", {"format": "pt", "config": '{"num_attention_heads": 4}'})
    run = trainer("--fp8_base", **{part: tmp_path / "other.safetensors"})
    with pytest.raises(UserError, match=f"is {name}, but weights are kept in 8 bits as float8_e4m3fn only"):
        run.train()
    assert run.pipeline.modules == {}
    if part == "t5xxl":  # without 8 bits in memory they are numbers like others
        trainer(**{part: tmp_path / "other.safetensors"}).train()


def test_the_network_may_be_in_half_precision_over_8_bits(trainer, tmp_path):
    run = trainer("--fp8_base", "--full_bf16", "--cache_text_encoder_outputs")
    run.train()
    assert {parameter.dtype for parameter in run.network.parameters()} == {torch.bfloat16}
    tensors = load_file(tmp_path / "out" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))


def test_chroma_trains_in_8_bits(chroma_command, dataset_toml, tmp_path):
    from accelerate.state import AcceleratorState

    given = [*chroma_command, "--max_train_steps", 2, "--output_dir", tmp_path, "--dataset_config", dataset_toml()]
    given += ["--mixed_precision", "bf16", "--fp8_base", "--max_data_loader_n_workers", "0"]
    AcceleratorState._reset_state(True)
    run = FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))
    run.train()
    AcceleratorState._reset_state(True)
    layers = layers_in_8_bits(run.pipeline.load_transformer())
    assert layers and not any(name.startswith("distilled_guidance_layer") for name in layers)
    assert layers_in_8_bits(run.pipeline.modules["t5xxl"])
    assert any(
        t.any() for name, t in load_file(tmp_path / "last.safetensors").items() if name.endswith("lora_up.weight")
    )
