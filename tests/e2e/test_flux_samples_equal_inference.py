"""A sample image of a training is, bit for bit, what the inference script draws with the LoRA of that moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.running import run_in_process

PROMPTS = """a red cat --w 80 --h 64 --s 3 --g 2.5 --d 5
# the next ones are guided away from another text, and from the empty one
a blue dog --w 64 --h 80 --s 2 --d 6 --l 3 --n small cat
the photo --w 64 --h 64 --s 2 --d 7 --l 2
"""
FORMATS = {
    "fp32": ("--mixed_precision", "no"),
    "bf16": ("--mixed_precision", "bf16", "--cache_text_encoder_outputs", "--network_train_unet_only"),
}


def pixels(folder: Path, beginning: str = "") -> list[tuple[tuple[int, int], bytes]]:
    found = []
    for path in sorted(folder.glob(f"{beginning}*.png")):
        with Image.open(path) as image:
            found.append((image.size, image.tobytes()))
    return found


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("flux", "fp32"),
        pytest.param("flux", "bf16", marks=pytest.mark.slow),
        pytest.param("chroma", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_same_image_from_both_scripts(request, model, dtype, dataset_toml, tmp_path):
    training, files = request.getfixturevalue(f"{model}_command"), request.getfixturevalue(f"tiny_{model}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    if model == "chroma":
        training = [*training, "--network_train_unet_only"]
    result = run_in_process(
        "flux_train_network.py",
        *training,
        *FORMATS[dtype],
        *("--dataset_config", dataset_toml(), "--output_dir", tmp_path, "--output_name", "trained"),
        *("--max_train_steps", "2", "--sample_at_first", "--sample_every_n_steps", "2", "--sample_prompts", prompts),
        *("--max_data_loader_n_workers", "0", "--learning_rate", "0.05"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    encoders = [] if model == "chroma" else ["--clip_l", files.clip_l]
    command = [
        *("--ckpt_path", files.transformer, "--t5xxl", files.t5xxl, "--ae", files.autoencoder, *encoders),
        *("--model_type", model, "--t5xxl_max_token_length", "16", "--from_file", prompts, "--dtype", dtype),
    ]
    drawn = run_in_process(
        "flux_minimal_inference.py",
        *command,
        *("--lora_weights", tmp_path / "trained.safetensors", "--output_dir", tmp_path / "drawn"),
    )
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    before, samples = (pixels(tmp_path / "sample", step) for step in ("trained_000000_", "trained_000002_"))
    assert len(samples) == 3
    assert pixels(tmp_path / "drawn") == samples
    assert all(a != b for a, b in zip(before, samples)), "the LoRA changes each image"
