"""On a CUDA device: Stable Diffusion in half precision, and a LoRA that is itself kept in 16 bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.running import launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("sd1", "--mixed_precision fp16 --gradient_checkpointing --noise_offset 0.1 --multires_noise_iterations 4"),
        ("sd2", "--mixed_precision fp16 --full_fp16 --no_half_vae --zero_terminal_snr"),
        ("sdxl", "--mixed_precision bf16 --full_bf16 --gradient_checkpointing --cpu_offload_checkpointing"),
    ],
)
def test_half_precision_trains(request, dataset_toml, tmp_path, family, arguments):
    command = request.getfixturevalue(f"{family}_command")
    dataset = dataset_toml(resolution=64, bucket_reso_steps=64)
    result = launch(
        "sdxl_train_network.py" if family == "sdxl" else "train_network.py",
        *(*command, "--dataset_config", dataset, "--output_dir", tmp_path, "--max_train_steps", "20"),
        *arguments.split(),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    tensors = load_file(tmp_path / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
