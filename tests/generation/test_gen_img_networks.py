"""gen_img.py's networks and regions, through its command line with a tiny Stable Diffusion 1."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from gen_img import GenImg, GenImgOptions
from library.errors import UserError
from library.generation.image_files import text_in_image
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.options import parse_options
from networks import lora
from tests.generation.drawing import write_random_network


@pytest.fixture(scope="module")
def files(few_blocks_sd1, tmp_path_factory) -> list[Path]:
    """Two LoRA files for the text encoder and the U-Net."""
    folder = tmp_path_factory.mktemp("networks")
    pipeline = StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")
    encoders, unet = pipeline.load_text_encoders(), pipeline.load("unet")
    return [write_random_network(folder / f"{n}.safetensors", lora, encoders, unet, n, 4.0) for n in (1, 2)]


@pytest.fixture
def run(few_blocks_sd1, share_parts, tmp_path):
    def make(*arguments: object, outdir: str = "out") -> GenImg:
        given = ["--ckpt", few_blocks_sd1, "--W", 64, "--H", 64, "--steps", 1, "--seed", 3, "--sequential_file_name"]
        given += ["--outdir", tmp_path / outdir, *arguments]
        return share_parts(GenImg(parse_options(GenImgOptions, "", [str(argument) for argument in given])))

    return make


@pytest.fixture
def draw(run, tmp_path):
    """Draw prompt lines with more options; the images as [images, height, width, 3] in 0..255."""
    count = 0

    def make(lines: list[str], *arguments: object) -> numpy.ndarray:
        nonlocal count
        count += 1
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(f"{line} --d 5" for line in lines), encoding="utf-8")
        run("--from_file", file, *arguments, outdir=f"out{count}").run()
        paths = sorted((tmp_path / f"out{count}").iterdir())
        return numpy.stack([numpy.asarray(Image.open(path), dtype=int) for path in paths])

    make.folder = lambda: tmp_path / f"out{count}"  # type: ignore[attr-defined]
    return make


def networks(*files: Path) -> tuple[object, ...]:
    return ("--network_module", *["networks.lora"] * len(files), "--network_weights", *files)


def is_same(images: numpy.ndarray, others: numpy.ndarray) -> bool:
    """Whether they differ by no more than rounding; different ones must differ much."""
    difference = numpy.abs(images - others).max()
    assert difference <= 1 or difference > 4
    return bool(difference <= 1)


def test_networks_beside_merged_and_pre_calculated_draw_the_same_image(draw, files):
    """--network_mul, --network_merge, --network_merge_n_models, --network_pre_calc"""
    plain = draw(["a cat --n blurry"])
    given = (*networks(*files), "--network_mul", 0.8, "-0.5")
    beside = draw(["a cat --n blurry"], *given)
    (path,) = draw.folder().iterdir()
    assert "1.safetensors" in str(text_in_image(path))
    assert not is_same(beside, plain)
    for more in (("--network_merge",), ("--network_merge_n_models", 1), ("--network_pre_calc",)):
        assert is_same(draw(["a cat --n blurry"], *given, *more), beside)


def test_a_prompt_has_strengths_of_its_own(draw, files):
    """--am: images with others are not drawn together, and each is as if it were drawn alone."""
    lines = ["a cat --am 0", "a cat --am 0.5,1", "a cat", "a cat --am -1,0"]
    images = draw(lines, *networks(*files), "--batch_size", 4, "--network_pre_calc")
    expected = [draw(["a cat"])]
    for first, second in ((0.5, 1), (1, 1), (-1, 0)):
        expected.append(draw(["a cat"], *networks(*files), "--network_mul", first, second))
    assert is_same(images, numpy.concatenate(expected))
    assert not is_same(images[:1], images[1:2])


def test_strengths_of_a_prompt_count_from_the_first_network_that_is_not_merged(draw, files):
    given = (*networks(*files), "--network_merge_n_models", 1)
    assert is_same(draw(["a cat --am 0"], *given), draw(["a cat"], *networks(files[0])))


def test_parts_of_a_prompt_without_mask_and_networks(draw):
    """ " AND ", which also shares batches with nothing else."""
    alone = draw(["a cat"])
    images = draw(["a cat AND a cat", "a cat", "a cat AND two dogs"], "--batch_size", 3)
    assert is_same(images[:1], alone) and is_same(images[1:2], alone) and not is_same(images[2:], alone)
    features = ["--dsd1 1 --dst1 0", "--nl 1.5"]
    couples = draw([f"a cat AND a cat {feature}" for feature in features])
    assert is_same(couples, draw([f"a cat {feature}" for feature in features])), "also with other features"


def test_regions_with_networks(draw, files, tmp_path):
    """--mask_path: a network of strength 0 is none, and each acts with its part; --batch_size changes nothing."""
    columns = [numpy.full((64, 32, 3), colour, dtype=numpy.uint8) for colour in ((255, 0, 0), (0, 255, 0))]
    Image.fromarray(numpy.concatenate(columns, axis=1)).save(tmp_path / "mask.png")
    mask = ("--mask_path", tmp_path / "mask.png")
    lines = ["a cat AND two dogs --n blurry", "a cat AND two dogs --n blurry --am 0", "a bird AND a fish --n blurry"]
    images = draw(lines, *networks(*files), *mask, "--batch_size", 2)
    assert is_same(images, draw(lines, *networks(*files), *mask, "--network_pre_calc"))
    without = draw(lines[:1], *mask)
    assert is_same(images[1:2], without) and not is_same(images[:1], without)
    assert not is_same(without, draw(lines[:1]))
    codes = ("--network_regional_mask_max_color_codes", 2)
    assert is_same(draw(lines, *networks(*files), *mask, *codes), images), "red and green are the first two colours"


def test_mistakes_are_found_before_a_model_is_loaded(run, files, tmp_path):
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "mask.png")
    for arguments, sentence in (
        (("--network_merge", "--network_pre_calc"), "--network_merge and --network_pre_calc are mutually exclusive"),
        (("--network_merge", "--mask_path", tmp_path / "mask.png"), "--mask_path needs --image_path"),
        (("--mask_path", tmp_path / "mask.png"), "2 networks need a part of the prompt each"),
        (("--network_mul", 1, 1, 1), r"--network_mul has more values \(3\) than --network_module has modules \(2\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            run("--prompt", "a cat", *networks(*files), *arguments)
