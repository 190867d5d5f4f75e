"""Two processes with batch size 2 train what one process with batch size 4 trains."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.running import launch, run_in_process

FLUX = ("flux_train_network.py", "flux_command", {}, 1e-4)
# Noise options whose draws or norms could mix the items of a batch.
NOISE = "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 4 --ip_noise_gamma 0.1"
STABLE_DIFFUSION = ("train_network.py", "sd1_command", {"resolution": 64, "bucket_reso_steps": 64}, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "command", "sizes", "tolerance", "noise"),
    [(*FLUX, ""), (*STABLE_DIFFUSION, f"{NOISE} --min_snr_gamma 5")],
    ids=["flux", "sd1"],
)
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(
    request, dataset_toml, tmp_path, script, command, sizes, tolerance, noise
):
    arguments = [*request.getfixturevalue(command), *noise.split(), "--optimizer_type", "SGD", "--max_grad_norm", "0"]
    arguments += ["--max_data_loader_n_workers", "1"]
    arguments += ["--max_train_steps", "6", "--gradient_accumulation_steps", "2", "--output_name", "lora"]
    arguments += ["--network_args", "loraplus_lr_ratio=4"]
    # Twelve or twenty-four samples in each bucket: they divide evenly, so every step has the same items.
    for processes, batch_size in ((1, 4), (2, 2)):
        dataset = dataset_toml(batch_size=batch_size, num_repeats=4, flip_aug=True, **sizes)
        given = [*arguments, "--dataset_config", dataset, "--output_dir", tmp_path / str(processes)]
        result = launch(script, *given, processes=2) if processes == 2 else run_in_process(script, *given)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "lora.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys()
    moved = 0.0
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=tolerance, atol=1e-6)
        moved = max(moved, tensor.abs().max().item()) if "lora_up" in key else moved
    assert moved > 1e-4
