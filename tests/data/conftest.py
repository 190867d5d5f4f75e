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
    """A smooth image with some noise, different for every seed."""
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
