"""A sample image of a training is, bit for bit, what the inference script draws with the LoRA of that moment."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from PIL import Image

from tests.families.families import FAMILIES
from tests.running import run_in_process

DRAWING = [family for family in FAMILIES if family.inference]
SIMILAR = {("sd2", "bf16"), ("sdxl", "fp32")}
"""Cases that differ too little from others."""
ENOUGH = {"fp32": {"flux", "sd2"}, "bf16": {"flux", "lumina", "hunyuan_image", "sd1", "sdxl"}}
"""Whose images an ordinary run of the tests compares; the others take the same way in the other dtype."""

PROMPTS = """a red cat --w 96 --h 64 --s 2 {guidance} 2.5 --d 5
# the next ones are guided away from another text, and from the empty one
a blue dog --w 64 --h 96 --s 2 --d 6 --l 3 --n small cat
the photo --w 64 --h 64 --s 1 --d 7 --l 2
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
    ("family", "dtype"),
    [
        pytest.param(
            family,
            dtype,
            id=f"{family.name}-{dtype}",
            marks=[] if family.name in ENOUGH[dtype] else [pytest.mark.thorough],
        )
        for family, dtype in itertools.product(DRAWING, FORMATS)
        if (family.name, dtype) not in SIMILAR
    ],
)
def test_the_same_image_from_both_scripts(family, dtype, tiny_files, dataset_toml, tmp_path):
    files, prompts = tiny_files(family), tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS.format(guidance=family.guidance), encoding="utf-8")
    trained = run_in_process(
        family.script,
        *family.command(files),
        *FORMATS[dtype],
        *("--dataset_config", dataset_toml(resolution=64, bucket_reso_steps=64), "--output_dir", tmp_path),
        *("--output_name", "trained", "--max_train_steps", "1", "--sample_at_first", "--sample_every_n_steps", "1"),
        *("--sample_prompts", prompts),
        *("--max_data_loader_n_workers", "0", "--learning_rate", "0.05", "--no_report"),
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    drawn = run_in_process(
        family.inference,
        *(*family.drawing(files), "--from_file", prompts),
        *family.dtypes[dtype],
        *(*family.lora_option, tmp_path / "trained.safetensors", family.output_option, tmp_path / "drawn"),
    )
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    before, samples = (pixels(tmp_path / "sample", step) for step in ("trained_000000_", "trained_000001_"))
    assert len(samples) == 3
    assert pixels(tmp_path / "drawn") == samples
    assert all(a != b for a, b in zip(before, samples)), "the LoRA changes each image"
