"""Each key of a dataset configuration changes what is trained: pixels, captions, weights, order, or files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from library.data.build import build_dataset_groups
from library.data.config_file import DatasetTable, SubsetTable
from library.data.options import DatasetOptions

BUCKETS = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 16\n"
TAGS = "shuffle_caption = true\n"
GENERAL = {
    # key = value: what stands in [general] beside it, or in its place
    "resolution = 96": BUCKETS,
    "batch_size = 2": BUCKETS,
    "enable_bucket = true": BUCKETS.replace("enable_bucket", "random_crop"),
    "min_bucket_reso = 64": BUCKETS,
    "max_bucket_reso = 80": BUCKETS,
    "bucket_reso_steps = 8": BUCKETS,
    "bucket_no_upscale = true": BUCKETS,
    "network_multiplier = 0.5": BUCKETS,
    "interpolation_type = 'nearest'": BUCKETS,
}
SUBSET = {
    "num_repeats = 2": BUCKETS,
    "shuffle_caption = true": BUCKETS,
    "caption_separator = ';'": BUCKETS + TAGS,
    "keep_tokens = 2": BUCKETS + TAGS,
    "keep_tokens_separator = '|||'": BUCKETS + TAGS,
    "secondary_separator = ';'": BUCKETS,
    "enable_wildcard = true": BUCKETS,
    "trigger_word = 'sks'": BUCKETS,
    "caption_prefix = 'photo'": BUCKETS,
    "caption_suffix = 'blurred'": BUCKETS,
    "caption_dropout_rate = 1": BUCKETS,
    "caption_tag_dropout_rate = 0.9": BUCKETS,
    "caption_dropout_every_n_epochs = 2": BUCKETS,
    "token_warmup_min = 3": BUCKETS + "token_warmup_step = 10\n",
    "token_warmup_step = 100": BUCKETS,
    "color_aug = true": BUCKETS,
    "rotate_aug = 10": BUCKETS,
    "brightness_aug = 0.2": BUCKETS,
    "contrast_aug = 0.2": BUCKETS,
    "flip_aug = true": BUCKETS,
    "random_crop = true": BUCKETS,
    "face_crop_aug_range = [1.5, 1.5]": "random_crop = true\n",
    "custom_attributes = { diff_output_preservation = true }": BUCKETS,
    "resize_interpolation = 'nearest'": BUCKETS,
    "caption_extension = '.other'": BUCKETS,
    "cache_info = true": BUCKETS,
    "class_tokens = 'a dog'": BUCKETS + "caption_extension = '.none'\n",
    "alpha_mask = true": BUCKETS,
    "validation_split = 0.4": BUCKETS,
    "validation_seed = 12": BUCKETS + "validation_split = 0.4\n",
    "is_reg = true": BUCKETS,
}
PATHS = {"image_dir", "metadata_file", "conditioning_data_dir"}
"""Keys whose value is a path of the test's."""


@pytest.fixture
def outcome(tmp_path):
    """Everything that two epochs of training would see of a small folder, and the files that are made."""
    folder = tmp_path / "a"
    folder.mkdir()
    rng = numpy.random.default_rng(1)
    sizes = [(128, 80), (250, 80), (80, 100), (90, 128), (100, 84)]
    for number, (width, height) in enumerate(sizes):
        name = f"{number}_60_40_20_20"  # with a face at (60, 40)
        pixels = rng.integers(0, 255, (height, width, 4), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        text = f"{{cat|dog}} {number}, red ||| blue;green, one;two, three, four\nsecond line\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        (folder / f"{name}.other").write_text("another caption", encoding="utf-8")

    def run(general: str, subset: str = "", folder: Path = folder, masked: bool = False) -> list[object]:
        file = tmp_path / "set.toml"
        usual = {"resolution": "80", "caption_extension": "'.txt'"}
        usual = {key: value for key, value in usual.items() if key not in general + subset.partition("=")[0]}
        lines = "".join(f"{key} = {value}\n" for key, value in usual.items()) + general
        place = "" if "image_dir" in subset else f"image_dir = '{folder.as_posix()}'\n"
        other = tmp_path / "train"
        if "is_reg" in subset:  # regularisation images need images to stand beside
            other.mkdir(exist_ok=True)
            Image.new("RGB", (80, 80)).save(other / "x.png")
            place = f"image_dir = '{other.as_posix()}'\nnum_repeats = 5\n[[datasets.subsets]]\n{place}"
        file.write_text(f"{lines}[[datasets]]\n[[datasets.subsets]]\n{place}{subset}\n", encoding="utf-8")
        options = DatasetOptions(dataset_config=str(file), prior_loss_weight=0.5, masked_loss=masked)
        groups = build_dataset_groups(options, bucket_divisor=8, seed=5)
        seen: list[object] = [sorted(path.name for path in folder.iterdir())]
        for group in filter(None, groups):
            for epoch in (1, 2):
                for plan in group.plan(epoch, 7):
                    batch = group.load(plan, epoch=epoch, step=3, max_train_steps=100, seed=7)
                    seen.append([_plain(getattr(batch, field.name)) for field in dataclasses.fields(batch)])
            seen.append("end")
        return seen

    return run


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.shape, value.double().sum().item(), value.flatten()[::37].tolist()
    return value


@pytest.mark.parametrize("line", GENERAL)
def test_a_key_of_datasets_changes_what_is_trained(outcome, line):
    others = [other for other in GENERAL[line].splitlines() if other.split(" ")[0] != line.split(" ")[0]]
    without = outcome(GENERAL[line])
    assert outcome("\n".join([*others, line, ""])) != without == outcome(GENERAL[line])


@pytest.mark.parametrize("line", SUBSET)
def test_a_key_of_subsets_changes_what_is_trained(outcome, line):
    other = "is_reg = false" if "is_reg" in line else ""
    without = outcome(SUBSET[line], other)
    assert outcome(SUBSET[line], line) != without


def test_paths_say_what_is_trained(outcome, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for image in (tmp_path / "a").glob("*.png"):
        with Image.open(image) as opened:
            Image.new("RGB", opened.size, (90, 0, 0)).save(masks / image.name)
    (tmp_path / "meta.json").write_text(json.dumps({"0_60_40_20_20": {"caption": "x"}}), encoding="utf-8")
    plain = outcome(BUCKETS)
    masked = outcome(BUCKETS, f"conditioning_data_dir = '{masks.as_posix()}'", masked=True)
    assert masked != plain and len(masked) == len(plain)
    described = outcome(BUCKETS, f"metadata_file = '{(tmp_path / 'meta.json').as_posix()}'")
    assert described != plain and len(described) == 4  # one image in two epochs
    assert outcome(BUCKETS, f"image_dir = '{masks.as_posix()}'") != plain


def test_no_key_is_left_out():
    tried = {line.partition(" ")[0] for line in (*GENERAL, *SUBSET)} | PATHS
    assert tried == {*DatasetTable.model_fields, *SubsetTable.model_fields, "interpolation_type"} - {"subsets"}
