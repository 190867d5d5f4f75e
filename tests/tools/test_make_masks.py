"""Masks by a model, by the colour of a backdrop and by transparency, where training looks for them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from library.data.build import build_dataset_groups
from library.data.options import DatasetOptions
from library.lean_imports import transformers_class
from library.options import declared_options
from tests.running import run_in_process
from tests.tools import tiny_annotators as tiny
from tools.make_masks import MakeMasksOptions

GREEN = (0, 255, 0)
SIZES = {"a": (40, 50), "b": (70, 30), "c": (64, 64)}


@pytest.fixture
def images(tmp_path) -> Path:
    """A disc with a pattern before a green backdrop that is not quite even."""
    (tmp_path / "images").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        draws = numpy.random.default_rng(number)
        pixels = draws.integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8)
        backdrop = numpy.clip(numpy.array(GREEN) + draws.integers(-9, 9, pixels.shape), 0, 255).astype(numpy.uint8)
        disc = Image.new("L", size)
        ImageDraw.Draw(disc).ellipse((8, 6, size[0] - 12, size[1] - 4), fill=255)
        pixels[..., 1] //= 2  # nothing in the disc is green
        image = Image.composite(Image.fromarray(pixels), Image.fromarray(backdrop), disc)
        image.putalpha(disc.filter(ImageFilter.GaussianBlur(1)))
        image.save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def make(*arguments: object):
    return run_in_process("tools/make_masks.py", *arguments)


def mask(path: Path) -> numpy.ndarray:
    image = Image.open(path)
    assert image.mode == "L"
    return numpy.asarray(image).astype(int)


def opacity(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).getchannel("A")).astype(int)


def is_disc(path: Path) -> numpy.ndarray:
    """Where an image of the fixture is not green, computed pixel by pixel."""
    pixels = numpy.asarray(Image.open(path).convert("RGB")).astype(int)
    away = [[max(abs(int(c) - g) for c, g in zip(pixel, GREEN)) > 16 for pixel in row] for row in pixels]
    return numpy.array(away)


# ---- without a model -----------------------------------------------------------------------------------------------


def test_a_backdrop_of_one_colour_does_not_count(images):
    result = make("--image_dir", images, "--color", "#00ff00")
    assert result.returncode == 0 and "masks: 3 written, 0 there already" in result.stderr
    for name in SIZES:
        assert (mask(images.parent / "images_masks" / f"{name}.png") == 255 * is_disc(images / f"{name}.png")).all()
    make("--image_dir", images, "--color", "0,255,0", "--tolerance", 0, "--mask_dir", images.parent / "strict")
    make("--image_dir", images, "--color", "lime", "--invert", "--mask_dir", images.parent / "inverted")
    assert (mask(images.parent / "strict" / "c.png") > 0).mean() > 0.9
    assert (mask(images.parent / "inverted" / "c.png") == 255 * ~is_disc(images / "c.png")).all()


def test_transparency_becomes_a_mask(images):
    make("--image_dir", images, "--alpha", "--mask_dir", images.parent / "masks")
    soft = mask(images.parent / "masks" / "a.png")
    assert (soft == opacity(images / "a.png")).all() and len(set(soft.flatten())) > 5


def grown(area: numpy.ndarray, pixels: int) -> numpy.ndarray:
    """Every pixel that has one of ``area`` within this distance."""
    rows, columns = area.nonzero()
    place = numpy.indices(area.shape)
    distance = numpy.hypot(place[0][..., None] - rows, place[1][..., None] - columns).min(axis=-1)
    return distance <= pixels


def test_masks_grow_shrink_soften_and_leave_the_rest_some_weight(images):
    path, area = images.parent / "masks" / "c.png", is_disc(images / "c.png")
    where = ("--image_dir", images, "--color", "lime", "--mask_dir", path.parent, "--overwrite")
    make(*where, "--grow", 3)
    assert (mask(path) == 255 * grown(area, 3)).mean() > 0.99  # a disc of pixels is not quite round
    make(*where, "--grow", -3)
    assert (mask(path) == 255 * ~grown(~area, 3)).mean() > 0.99
    make(*where, "--feather", 2)
    soft = mask(path)
    blurred = numpy.asarray(Image.fromarray((255 * area).astype(numpy.uint8)).filter(ImageFilter.GaussianBlur(2)))
    assert abs(soft - blurred.astype(int)).max() < 12 and len(set(soft.flatten())) > 50
    make(*where, "--background", 0.2)
    assert set(mask(path).flatten()) == {51, 255}
    assert "images in which nothing counts: 3 (a.png, b.png, c.png)" in make(*where, "--grow", -40).stderr


def test_images_in_which_everything_counts_are_named(images):
    """A cut-out that lost its transparency."""
    Image.open(images / "b.png").convert("RGB").save(images / "b.png")
    said = make("--image_dir", images, "--alpha").stderr
    assert "images in which everything counts: 1 (b.png)" in said and "nothing counts" not in said
    assert set(mask(images.parent / "images_masks" / "b.png").flatten()) == {255}


def test_the_masks_are_those_that_training_takes(images, tmp_path):
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
        [[datasets]]
        resolution = 64
        enable_bucket = true
        min_bucket_reso = 32
        bucket_no_upscale = true
        bucket_reso_steps = 8
        [[datasets.subsets]]
        image_dir = '{images}'
        conditioning_data_dir = '{tmp_path / "masks"}'
        """,
        encoding="utf-8",
    )
    assert make("--dataset_config", config, "--color", "lime").returncode == 0
    options = DatasetOptions(dataset_config=str(config), masked_loss=True)
    dataset = build_dataset_groups(options, bucket_divisor=8)[0].datasets[0]
    item = next(item for item in dataset.items if item.path.name == "c.png")
    pixels = dataset.read_pixels(item, dataset.fixed_geometry(item))
    assert ((pixels.conditioning[0] > 0) == is_disc(item.path)).all()


def test_copies_of_images_with_the_mask_as_their_transparency(images, tmp_path):
    make("--image_dir", images, "--color", "lime", "--alpha_dir", tmp_path / "alpha")
    copy = Image.open(tmp_path / "alpha" / "b.png")
    assert (numpy.asarray(copy.getchannel("A")) == 255 * is_disc(images / "b.png")).all()
    assert (numpy.asarray(copy.convert("RGB")) == numpy.asarray(Image.open(images / "b.png").convert("RGB"))).all()


# ---- with a model --------------------------------------------------------------------------------------------------


def found_by_itself(kind: str, folder: Path, path: Path, words: list[str]) -> numpy.ndarray:
    """The mask by transformers' own classes and their own reading of the results, of one image."""
    image = Image.open(path)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    size = (image.height, image.width)
    names = {"segformer": "SegformerForSemanticSegmentation", "clipseg": "CLIPSegForImageSegmentation"}
    name = names.get(kind, "Mask2FormerForUniversalSegmentation")
    model = transformers_class(f"{kind}.modeling_{kind}", name).from_pretrained(folder).eval()
    if kind == "clipseg":
        processor = transformers_class("auto.processing_auto", "AutoProcessor").from_pretrained(folder, backend="pil")
    else:
        images = f"{name.rpartition('For')[0]}ImageProcessorPil"
        processor = transformers_class(f"{kind}.image_processing_pil_{kind}", images).from_pretrained(folder)
    with torch.no_grad():
        if kind == "clipseg":
            inputs = processor(images=[image] * len(words), text=words, return_tensors="pt", padding=True)
            logits = model(**inputs).logits.reshape(len(words), 1, 32, 32)
            large = torch.nn.functional.interpolate(logits.sigmoid(), size=size, mode="bilinear")
            return (large >= 0.5).any(dim=0)[0].numpy()
        inputs = processor(images=image, return_tensors="pt")
        outputs = model(**inputs)
    whole = size
    if kind == "mask2former":  # its own reading has the padding in it
        used = [int(inputs["pixel_mask"][0].any(dim=axis).sum()) for axis in (1, 0)]
        whole = tuple(round(full * own / part) for full, own, part in zip(inputs["pixel_mask"].shape[1:], size, used))
    labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[whole])[0]
    return numpy.isin(labels[: size[0], : size[1]].numpy(), [tiny.LABELS.index(word) for word in words])


@pytest.mark.parametrize(
    ("kind", "words", "alike"),
    [("segformer", ["cat", "wall"], 1), ("mask2former", ["cat", "wall"], 0.97), ("clipseg", ["a cat", "x"], 1)],
)
def test_a_model_finds_in_batches_what_it_finds_by_itself(kind, words, alike, images, models):
    folder = models(kind)
    result = make("--image_dir", images, "--model", folder, "--batch_size", 3, "--classes", *words)
    assert result.returncode == 0, result.stderr
    shares = []
    for name in SIZES:
        wanted = found_by_itself(kind, folder, images / f"{name}.png", words)
        shares.append(wanted.mean())
        assert ((mask(images.parent / "images_masks" / f"{name}.png") > 0) == wanted).mean() >= alike
    assert any(0.05 < share < 0.95 for share in shares)


def test_clipseg_takes_more_with_a_lower_threshold(images, models):
    where = ("--image_dir", images, "--model", models("clipseg"), "--classes", "a cat", "--overwrite")
    shares = []
    for threshold in (0.2, 0.5, 0.8):
        make(*where, "--threshold", threshold, "--device", "cpu", "--dtype", "fp32")
        shares.append((mask(images.parent / "images_masks" / "c.png") > 0).mean())
    assert shares[0] > shares[1] > shares[2]


# ---- what is there already, and mistakes ---------------------------------------------------------------------------


def test_masks_that_are_there_are_kept(images):
    masks = images.parent / "images_masks"
    masks.mkdir()
    Image.new("L", (40, 50), 7).save(masks / "a.png")
    Image.new("L", (70, 30), 7).save(masks / "b.bmp")
    where = ("--image_dir", images, "--color", "lime")
    assert f"c.png -> {masks / 'c.png'}" in make(*where, "--dry_run").stderr and not (masks / "c.png").exists()
    assert "masks: 1 written, 2 there already" in make(*where).stderr
    assert set(mask(masks / "a.png").flatten()) == {7} and not (masks / "b.png").exists()
    assert "b.bmp would remain beside the new b.png" in refused(*where, "--overwrite")
    (masks / "b.bmp").unlink()
    assert "masks: 3 written" in make(*where, "--overwrite").stderr and set(mask(masks / "a.png").flatten()) == {0, 255}


def test_sub_folders_have_masks_of_their_own_and_masks_are_no_images(images):
    (images / "10_cat").mkdir()
    (images / "a.png").rename(images / "10_cat" / "a.png")
    where = ("--image_dir", images, "--color", "lime", "--recursive", "--mask_dir", images / "masks")
    for _ in range(2):
        make(*where)
        made = sorted(path.relative_to(images).as_posix() for path in (images / "masks").rglob("*.png"))
        assert made == ["masks/10_cat/a.png", "masks/b.png", "masks/c.png"]


def test_broken_images_are_named_and_the_others_have_masks(images):
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:60])
    result = make("--image_dir", images, "--alpha")
    assert result.returncode == 1 and f"{images / 'bad.png'}: " in result.stderr
    assert len(list((images.parent / "images_masks").iterdir())) == 3


def refused(*arguments: object) -> str:
    result = make(*arguments)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    return result.stderr


def test_options_that_cannot_be_or_do_nothing(images, models, tmp_path):
    where = ("--image_dir", images)
    assert "Give one of --model, --color and --alpha" in refused(*where)
    assert "Give one of --model, --color and --alpha" in refused(*where, "--alpha", "--color", "red")
    assert '"gren" is not a colour' in refused(*where, "--color", "gren")
    assert '"1,2,300" is not a colour' in refused(*where, "--color", "1,2,300")
    assert "--tolerance" in refused(*where, "--color", "red", "--tolerance", 300)
    assert "--background" in refused(*where, "--alpha", "--background", 1)
    assert "--grow" in refused(*where, "--alpha", "--grow", 5000)
    assert "--batch_size" in refused(*where, "--alpha", "--batch_size", 0)
    assert "is the folder of the images" in refused(*where, "--alpha", "--alpha_dir", images)
    assert "either --mask_dir or --alpha_dir" in refused(*where, "--alpha", "--alpha_dir", "x", "--mask_dir", "y")
    assert "hf download nvidia/segformer-b0" in refused(*where, "--model", "nvidia/segformer-b0")
    assert "is a model of the type blip; masks are made by segformer" in refused(*where, "--model", models("blip"))
    segformer = (*where, "--model", models("segformer"))
    assert "which of the model's 4 classes count (wall, cat, sofa, dog)?" in refused(*segformer)
    assert 'Did you mean "sofa"?' in refused(*segformer, "--classes", "sofo")
    for nothing in ([], ["--classes", "a cat", " "]):
        assert "what CLIPSeg looks for" in refused(*where, "--model", models("clipseg"), *nothing)
    beyond = refused(*where, "--model", models("clipseg"), "--classes", "a cat", "cat" * 20)
    assert re.search(r"(cat){20}\" has \d+ tokens; the model reads 32 at most", beyond)
    said = make(*segformer, "--classes", "cat", "--threshold", 0.3, "--tolerance", 3, "--dry_run").stderr
    assert "--threshold has no effect" in said and "--tolerance has no effect without --color" in said
    config = tmp_path / "data.toml"
    config.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\n", encoding="utf-8")
    assert re.search(r"number 1: conditioning_data_dir, .* is missing", refused("--dataset_config", config, "--alpha"))


def test_every_option_is_exercised_here():
    text = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"config_file", "output_config", "console_log_level", "console_log_file", "console_log_simple"}
    names = set(declared_options(MakeMasksOptions)) - elsewhere
    assert {name for name in names if f'"--{name}"' not in text} == set()
