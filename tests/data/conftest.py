"""Small real image folders for the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest
from PIL import Image

from library.data.build import build_dataset_groups
from library.data.options import CacheOptions, DatasetOptions


def write_image(path: Path, size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Path:
    """A smooth picture with some noise, different for every seed."""
    width, height = size
    rows, columns = numpy.mgrid[0:height, 0:width]
    rng = numpy.random.default_rng(seed)
    phase = rng.uniform(0, 6, 4)
    waves = [128 + 100 * numpy.sin(rows / (9 + seed % 5) + columns / 13 + phase[c]) for c in range(len(mode))]
    array = numpy.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, len(mode)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.clip(0, 255).astype(numpy.uint8), mode=mode).save(path)
    return path


def make_folder(
    folder: Path, sizes: Sequence[tuple[int, int]], captions: Sequence[str] | None = None, extension: str = ".txt"
) -> Path:
    """Images 00.png, 01.png, ... of the given sizes, with captions."""
    for index, size in enumerate(sizes):
        write_image(folder / f"{index:02d}.png", size, seed=index)
        text = f"subject {index}, tag a, tag b" if captions is None else captions[index]
        (folder / f"{index:02d}{extension}").write_text(text, encoding="utf-8")
    return folder


def config_text(value: object) -> str:
    """A TOML value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return "'" + str(value) + "'"
    return str(value)


@pytest.fixture
def build(tmp_path: Path) -> Callable:
    """``build(folder or folders, general={...}, subset={...}, **arguments)`` -> (training, validation group)."""

    def make(folders, general=None, subset=None, cache=None, options=None, toml=None, **arguments):
        folders = [folders] if isinstance(folders, Path) else folders
        lines = ["[general]", "resolution = 64", 'caption_extension = ".txt"']
        if general is not None:
            lines = [line for line in lines if line.split(" =")[0] not in general]
        lines += [f"{key} = {config_text(value)}" for key, value in (general or {}).items()]
        lines.append("[[datasets]]")
        for folder in folders:
            lines += ["[[datasets.subsets]]", f"image_dir = {config_text(folder)}"]
            lines += [f"{key} = {config_text(value)}" for key, value in (subset or {}).items()]
        file = tmp_path / "dataset.toml"
        file.write_text(toml if toml is not None else "\n".join(lines), encoding="utf-8")
        given = options or DatasetOptions()
        given.dataset_config = str(file)
        arguments.setdefault("bucket_divisor", 8)
        arguments.setdefault("seed", 3)
        return build_dataset_groups(given, cache=cache, **arguments)

    return make


BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


@pytest.fixture
def buckets() -> dict:
    """Bucket options for tiny images."""
    return dict(BUCKETS)


@pytest.fixture
def caching() -> CacheOptions:
    return CacheOptions(cache_latents=True)


@pytest.fixture
def image() -> Callable:
    return write_image


@pytest.fixture
def folder_of() -> Callable:
    return make_folder


MULTI_RESOLUTION = """
[general]
# Common settings
flip_aug = true
color_aug = false
keep_tokens_separator= "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"

[[datasets]]
# First resolution settings
batch_size = 2
enable_bucket = true
resolution = [1024, 1024]

  [[datasets.subsets]]
  image_dir = "path/to/image/directory"
  num_repeats = 1

[[datasets]]
# Second resolution settings
batch_size = 3
enable_bucket = true
resolution = [768, 768]

  [[datasets.subsets]]
  image_dir = "path/to/image/directory"
  num_repeats = 1
"""

VALIDATION = """
validation_seed = 42 # [Optional] Validation seed, otherwise uses training seed for validation split .
enable_bucket = true
resolution = [1024, 1024]

[[datasets]]
  [[datasets.subsets]]
  # This directory will use 100% of the images for training
  image_dir = "path/to/image/directory"

[[datasets]]
validation_split = 0.1 # Split between 0.0 and 1.0 where 1.0 will use the full subset as a validation dataset

  [[datasets.subsets]]
  # This directory will split 10% to validation and 90% to training
  image_dir = "path/to/image/second-directory"

[[datasets]]
validation_split = 1.0 # Will use this full subset as a validation subset.

  [[datasets.subsets]]
  # This directory will use the 100% to validation and 0% to training
  image_dir = "path/to/image/full_validation"
"""

INTERPOLATION = """
[[datasets]]
resolution = [1024, 1024]
enable_bucket = true
interpolation_type = "lanczos" # Example: Use Lanczos interpolation
# ...
  [[datasets.subsets]]
  image_dir = "x"
"""


@pytest.fixture
def documented() -> dict[str, str]:
    """The dataset configurations of the FLUX.1 guide, word for word (the last one with a subset in place of "...")."""
    return {"multi_resolution": MULTI_RESOLUTION, "validation": VALIDATION, "interpolation": INTERPOLATION}
