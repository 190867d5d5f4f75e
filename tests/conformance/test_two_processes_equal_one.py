"""Two processes with batch size 2 train what one process with batch size 4 trains; they share what there is to do."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from library.html_pages import read_page_data
from tests.running import launch, run_in_process

SIZES = {"resolution": 64, "bucket_reso_steps": 64}
FLUX = ("flux_train_network.py", "flux_command", 1e-4)
# What the processes share, and what only one of them writes.
SHARED = "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --sample_every_n_steps 4 --sample_prompts"
# Noise options whose draws or norms could mix the items of a batch.
NOISE = "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 4 --ip_noise_gamma 0.1"
STABLE_DIFFUSION = ("train_network.py", "sd1_command", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "command", "tolerance", "more"),
    [(*FLUX, SHARED), (*STABLE_DIFFUSION, f"{NOISE} --min_snr_gamma 5")],
    ids=["flux", "sd1"],
)
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(
    request, image_folder, dataset_toml, tmp_path, script, command, tolerance, more
):
    images, prompts = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 3\na dog --w 96 --h 64 --s 1 --d 4\n", encoding="utf-8")
    arguments = [*request.getfixturevalue(command), *more.split(), *([prompts] if more == SHARED else [])]
    arguments += ["--optimizer_type", "SGD", "--max_grad_norm", "0"]
    arguments += ["--max_data_loader_n_workers", "1"]
    arguments += ["--max_train_steps", "4", "--gradient_accumulation_steps", "2", "--output_name", "lora"]
    arguments += ["--network_args", "loraplus_lr_ratio=4"]
    # Twelve or twenty-four samples in each bucket: they divide evenly, so every step has the same items.
    said = {}
    for processes, batch_size in ((2, 2), (1, 4)):
        dataset = dataset_toml(images, batch_size=batch_size, num_repeats=4, flip_aug=True, **SIZES)
        given = [*arguments, "--dataset_config", dataset, "--output_dir", tmp_path / str(processes)]
        result = launch(script, *given, processes=2) if processes == 2 else run_in_process(script, *given)
        assert result.returncode == 0, result.stderr[-3000:]
        said[processes] = result.stderr
    one, two = (load_file(tmp_path / name / "lora.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys()
    moved = 0.0
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=tolerance, atol=1e-6)
        moved = max(moved, tensor.abs().max().item()) if "lora_up" in key else moved
    assert moved > 1e-4
    if more == SHARED:
        cached = r"(?:latent|text encoder) cache: (\d+) kept, (\d+) made"
        counts = [re.findall(cached, said[processes]) for processes in (2, 1)]
        assert counts == [[("0", "6")] * 2, [("12", "0")] * 2], "the first process tells of its half"
        page = read_page_data(tmp_path / "2" / "lora.report.html")
        assert [sorted(entry["images"]) for entry in page["samples"]["rounds"]] == [["0", "1"]]
        assert page["status"]["state"] == "finished" and "2 processes" in dict(page["facts"])["Device"]
