"""On a CUDA device: half precision with gradient scaling, and a run that is resumed, through the command line."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.running import launch
from tools.make_tiny_controlnet import make_tiny_controlnet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp16 --fp8_base", "bf16 --fp8_base --blocks_to_swap 2"])
def test_half_precision_trains(flux_command, dataset_toml, tmp_path, precision):
    result = launch(
        "flux_train_network.py",
        *(*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path, "--max_train_steps", "20"),
        *("--mixed_precision", *precision.split(), "--optimizer_type", "AdamW8bit", "--gradient_checkpointing"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "expected memory on cuda" in result.stderr and " on the device (" in result.stderr
    tensors = load_file(tmp_path / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "bf16 --fp8_base --cpu_offload_checkpointing"])
def test_chroma_trains_and_samples(chroma_command, dataset_toml, tmp_path, precision):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --n blurry --w 64 --h 64 --s 2 --d 1 --l 4.0 --g 0.0\n", encoding="utf-8")
    result = launch(
        "flux_train_network.py",
        *(*chroma_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path, "--max_train_steps", "10"),
        *("--mixed_precision", *precision.split(), "--gradient_checkpointing", "--cache_latents"),
        *("--cache_text_encoder_outputs", "--sample_prompts", prompts, "--sample_every_n_steps", "10"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    tensors = load_file(tmp_path / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    assert len(list((tmp_path / "sample").glob("*.png"))) == 1


@pytest.mark.parametrize("kind", ["xlabs", "instantx"])
def test_a_controlnet_takes_part(flux_command, dataset_toml, control_folder, tmp_path, kind):
    control = make_tiny_controlnet(tmp_path / "net", "diffusers", kind)
    prompts = tmp_path / "prompts.txt"
    image = sorted(control_folder.glob("*.png"))[0]
    prompts.write_text(f"a circle --w 64 --h 64 --s 2 --d 1 --cn {image}\n", encoding="utf-8")
    dataset = dataset_toml(subset={"conditioning_data_dir": control_folder.as_posix()})
    result = launch(
        "flux_train_network.py",
        *(*flux_command, "--dataset_config", dataset, "--output_dir", tmp_path, "--max_train_steps", "5"),
        *("--controlnet_model_name_or_path", control, "--mixed_precision", "bf16", "--fp8_base", "--cache_latents"),
        *("--gradient_checkpointing", "--sample_prompts", prompts, "--sample_every_n_steps", "5"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / "sample").glob("*.png"))) == 1
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "last.safetensors").values())


def test_a_resumed_half_precision_run_keeps_its_gradient_scale(flux_command, dataset_toml, tmp_path):
    arguments = [*flux_command, "--dataset_config", dataset_toml(), "--mixed_precision", "fp16", "--save_state"]
    arguments += ["--save_every_n_steps", "10", "--cache_latents", "--cache_text_encoder_outputs"]
    whole = launch("flux_train_network.py", *arguments, "--output_dir", tmp_path / "a", "--max_train_steps", "20")
    assert whole.returncode == 0, whole.stderr[-3000:]
    state = tmp_path / "a" / "at-step00000010-state"
    again = [*arguments, "--output_dir", tmp_path / "b", "--max_train_steps", "20", "--resume", state]
    resumed = launch("flux_train_network.py", *again)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-5)
