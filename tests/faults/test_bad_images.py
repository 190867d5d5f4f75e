"""Odd images are read by everyone, broken ones are named by everyone: one sentence, no traceback, no waiting."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from library.data.image_check import Look, look_at
from library.errors import UserError
from library.generation.guide_images import GuideImages
from library.generation.image_files import text_in_image
from library.generation.regions import read_regions
from library.generation.sampling_options import SamplingOptions
from library.generation.start_images import StartImageOptions, open_start_images
from library.image_reading import read_given_image, read_image
from tests.families.families import TINY
from tests.faults.corpus import SIZE, broken_images, odd_images, odd_shapes, special_files, written
from tests.running import no_weights_are_read, run_in_process
from tools import show_metadata

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
SECONDS = 2.0
"""Within which each reader must have its answer for a file of a few kilobytes."""
IN_THE_PIXELS = {"missing pixels.png", "no pixels.png", "pixels that are none.png", "pixels cut.png"}
"""Sound in their structure and checksums; no program writes them, and only decoding shows it."""


def start_image(path: Path) -> Image.Image:
    images = open_start_images(StartImageOptions(image_path=str(path), mask_path=str(path)), SamplingOptions())
    assert images is not None
    assert images.mask(0).mode == "L"
    return images.image(0)


def mask_of_regions(path: Path) -> Image.Image:
    return Image.fromarray((read_regions(path, None).permute(1, 2, 0) * 255).byte().numpy())


def shown_metadata(path: Path) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        show_metadata.main(["--model", str(path)])
    return printed.getvalue()


PIXELS: dict[str, Callable[[Path], Image.Image]] = {
    "training": lambda path: read_image(path)[0],
    "training with alpha_mask": lambda path: read_image(path, alpha=True)[0],
    "a control image of a prompt": lambda path: read_given_image(path, "prompt 1: control image"),
    "--image_path": start_image,
    "--guide_image_path": lambda path: GuideImages([str(path)]).image(0),
    "regions of --mask_path": mask_of_regions,
}


def sentence(read: Callable[[Path], object], path: Path) -> str:
    """What ``read`` says of a broken file."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        read(path)
    assert time.monotonic() - started < SECONDS
    said = str(error.value)
    assert path.name in said and "\n" not in said, said
    return said


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[str, Path]:
    return written(odd_images(), tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("broken")
    return {**written(broken_images(), folder), **special_files(folder)}


@pytest.mark.parametrize("reader", PIXELS)
def test_odd_images_are_read(odd, reader):
    for name, path in odd.items():
        image = PIXELS[reader](path)
        assert (image.mode, image.size) == ("RGB", SIZE), name


@pytest.mark.parametrize("reader", PIXELS)
def test_broken_images_are_named_by_whoever_reads_pixels(broken, reader):
    for path in broken.values():
        sentence(PIXELS[reader], path)


def test_broken_images_are_named_by_whoever_reads_their_text(broken):
    for name, path in broken.items():
        if name != "half.tiff.png":  # whose text stands in the first half
            sentence(shown_metadata, path)


def test_text_of_megabytes_in_an_image_is_read_as_programs_write_it(odd):
    assert {len(text) for text in text_in_image(odd["much text.png"]).values()} == {3 << 20}
    assert len(json.loads(shown_metadata(odd["much text.png"]))) == 1


@pytest.mark.parametrize("reader", PIXELS)
def test_sixteen_bits_become_eight_and_are_not_cut_off(odd, reader):
    ramp = numpy.linspace(0, 255, SIZE[0])
    for channels in (1, 2, 3, 4):
        image = PIXELS[reader](odd[f"16 bits in {channels} channels.png"])
        assert numpy.abs(numpy.asarray(image)[0] - ramp[:, None]).max() <= 1, channels


def test_the_quick_look_finds_everything_but_damaged_pixels(odd, broken):
    for name, path in odd.items():
        look = look_at(path)
        assert isinstance(look, Look) and look.size == SIZE, name
    for name, path in broken.items():
        started = time.monotonic()
        assert isinstance(look_at(path), str) != (name in IN_THE_PIXELS), name
        assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("model", TINY)
def test_training_names_broken_images_before_anything_is_read(request, broken, dataset_toml, tmp_path, model):
    files = request.getfixturevalue(f"{'few_blocks' if model.startswith('sd') else 'tiny'}_{model}")
    family, folder = TINY[model], next(iter(broken.values())).parent
    given = [*family.command(files), "--output_dir", tmp_path / "out", "--max_train_steps", 1]
    with no_weights_are_read():
        result = run_in_process(family.script, *given, "--dataset_config", dataset_toml(folder, bucket_reso_steps=64))
    assert_all_are_named(result, len(broken), len(broken))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_broken_masks_are_named_before_anything_is_read(broken, flux_command, dataset_toml, tmp_path):
    stems = {path.stem: path for path in broken.values()}
    images = written({f"{stem}.png": odd_images()["RGBA.png"] for stem in stems}, tmp_path / "images")
    (tmp_path / "masks").mkdir()
    for stem, path in stems.items():
        (tmp_path / "masks" / f"{stem}.png").symlink_to(path)
    dataset = dataset_toml(tmp_path / "images", subset={"conditioning_data_dir": (tmp_path / "masks").as_posix()})
    given = [*flux_command, "--output_dir", tmp_path / "out", "--dataset_config", dataset, "--masked_loss"]
    with no_weights_are_read():
        result = run_in_process("flux_train_network.py", *given)
    assert_all_are_named(result, len(images), 2 * len(images))


def assert_all_are_named(result: Any, broken: int, images: int) -> None:
    count = broken - len(IN_THE_PIXELS)
    assert result.returncode == 2, result.stderr
    assert f"error: {count} of {images} images cannot be read:\n" in result.stderr
    assert f"  and {count - 20} more\n" in result.stderr


@pytest.mark.parametrize("tool", ["tools/cache_latents.py", "flux_train_network.py"])
def test_damaged_pixels_are_named_by_whoever_decodes_them(flux_command, dataset_toml, tmp_path, tool):
    for name in sorted(IN_THE_PIXELS):
        folder = tmp_path / name
        written({name: broken_images()[name]}, folder)
        given = [*flux_command, "--dataset_config", dataset_toml(folder), "--cache_latents_to_disk"]
        given += ["--flux"] if tool.startswith("tools") else ["--output_dir", tmp_path, "--max_train_steps", 1]
        result = run_in_process(tool, *given)
        _, _, said = result.stderr.partition("error: ")
        assert result.returncode == 2 and name in said and len(said.splitlines()) == 1, result.stderr[-2000:]


def test_odd_images_are_trained(flux_command, dataset_toml, odd, tmp_path):
    folder = tmp_path / "images"
    written(odd_images() | odd_shapes(), folder)
    dataset = dataset_toml(folder, resolution=64, max_bucket_reso=128, batch_size=1, subset={"alpha_mask": True})
    given = [*flux_command, "--dataset_config", dataset, "--output_dir", tmp_path / "out", "--no_report"]
    result = run_in_process("tools/cache_latents.py", "--flux", *flux_command, "--dataset_config", dataset)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list(folder.glob("*.npz"))) == len(list(folder.iterdir())) / 2
    given += ["--cache_latents_to_disk", "--max_train_steps", 2]
    assert run_in_process("flux_train_network.py", *given).returncode == 0


def test_an_image_that_would_be_enlarged_beyond_all_memory_is_named(flux_command, dataset_toml, tmp_path):
    folder = tmp_path / "images"
    written(odd_shapes(), folder)
    dataset = dataset_toml(folder, resolution=1024, min_bucket_reso=256, max_bucket_reso=2048)
    result = run_in_process(
        "flux_train_network.py", *flux_command, "--dataset_config", dataset, "--output_dir", tmp_path
    )
    assert result.returncode == 2
    assert "1x5000.png: 1x5000 pixels would be enlarged to 256x1280000 to fill 256x2048; crop the" in result.stderr
    assert "5000x1.png: 5000x1 pixels would be enlarged to 1280000x256 to fill" in result.stderr
    assert "1x1.png" not in result.stderr and "3x2.png" not in result.stderr
