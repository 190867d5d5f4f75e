"""Highres. fix: the sizes of its stages, what lies between them, and the upscaler that a module gives."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.errors import UserError
from library.generation.highres_fix import HighresFix, HighresOptions, open_highres
from library.generation.image_prompts import ImagePrompt
from library.models.pipeline import from_image
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from tools import latent_upscaler


@pytest.fixture(scope="module")
def pipeline(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


def highres(pipeline: Any, **options: Any) -> HighresFix:
    values: dict[str, Any] = {"highres_fix_scale": 0.5, **options}
    opened = open_highres(HighresOptions(**values), pipeline)
    assert opened is not None
    return opened


def write_weights(path: Path, change: float = 0.0) -> Path:
    torch.manual_seed(0)
    network = latent_upscaler.Upscaler()
    torch.nn.init.zeros_(network.conv_final.bias)
    torch.nn.init.constant_(network.conv_final.weight, change)
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def upscaler_module(monkeypatch):
    """A module ``own_upscaler`` with this ``create_upscaler``."""

    def make(create: Any) -> None:
        module = ModuleType("own_upscaler")
        if create is not None:
            module.create_upscaler = create
        monkeypatch.setitem(sys.modules, "own_upscaler", module)

    return make


class Halves:
    """An upscaler that notes what it is told."""

    def __init__(self, latents: bool, result: Any):
        self.latents, self.result, self.told = latents, result, ()

    def to(self, where: Any) -> Halves:
        return self

    def support_latents(self) -> bool:
        return self.latents

    def upscale(self, *arguments: Any) -> Any:
        self.told = arguments
        return self.result


# ---- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, scale, first", [((768, 512), 0.5, (384, 256)), ((1000, 1000), 0.5, (480, 480))])
def test_the_first_image_is_smaller_by_multiples_of_32(size, scale, first):
    """``--highres_fix_scale``, ``--highres_fix_steps``."""
    prompt = ImagePrompt("a cat", width=size[0], height=size[1], sample_steps=50, seed=5)
    small = highres(None, highres_fix_scale=scale, highres_fix_steps=12).first(prompt)
    assert (small.width, small.height, small.sample_steps, small.seed) == (*first, 12, 5)
    assert highres(None).first(prompt).sample_steps == 28


def test_sizes_that_xl_is_told_are_scaled_too():
    prompt = ImagePrompt(width=1024, height=1024, original_height=1001, crop_left=33, original_width_negative=77)
    small = highres(None).first(prompt)
    assert (small.original_height, small.crop_left, small.original_width_negative) == (501, 17, 39)
    assert small.original_width is None and small.crop_top is None


def test_the_second_image_has_the_next_seed_and_a_strength():
    """``--highres_fix_strength`` is the first image's alone."""
    fix = highres(None, highres_fix_strength=0.3)
    prompt = ImagePrompt("a cat", width=128, height=64, sample_steps=9, seed=5, strength=0.6)
    large = fix.second(prompt)
    assert (large.width, large.height, large.sample_steps, large.seed, large.strength) == (128, 64, 9, 6, 0.6)
    assert fix.first(prompt).strength == 0.3 and highres(None).first(prompt).strength == 0.6
    assert fix.second(ImagePrompt(seed=2**64 - 1)).seed == 0
    assert fix.second(ImagePrompt()).strength == 0.8


# ---- between them ----------------------------------------------------------------------------------------------------


def test_an_image_is_enlarged_and_encoded(pipeline):
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    fix = highres(pipeline)
    (latents,) = fix.enlarged(None, [image], 128, 96)
    expected = pipeline.encode_images(from_image(image, 128, 96)[None], None)[0] * pipeline.latent_scale
    assert not fix.takes_latents and torch.equal(latents, expected)


def test_latents_are_enlarged_as_they_are(pipeline):
    """``--highres_fix_latents_upscaling``."""
    fix = highres(pipeline, highres_fix_latents_upscaling=True)
    flat = torch.full((2, 4, 8, 8), 0.7)
    flat[1] = -0.2
    first, second = fix.enlarged(flat, None, 128, 104)
    assert fix.takes_latents and first.shape == (4, 13, 16)
    assert torch.allclose(first, torch.tensor(0.7)) and torch.allclose(second, torch.tensor(-0.2))


@pytest.mark.parametrize("takes_latents", [True, False])
def test_a_modules_upscaler_gets_latents_or_images(pipeline, upscaler_module, takes_latents):
    """``--highres_fix_upscaler``, ``--highres_fix_upscaler_args``."""
    made: list[Any] = []

    def create(name: str, factor: str = "1") -> Halves:
        result = torch.ones(1, 4, 12, 16) if takes_latents else [Image.new("RGB", (30, 20), "red")]
        made.append((name, factor, Halves(takes_latents, result)))
        return made[0][2]

    upscaler_module(create)
    fix = highres(pipeline, highres_fix_upscaler="own_upscaler", highres_fix_upscaler_args="name=a b; factor=3;")
    assert made[0][:2] == ("a b", "3") and fix.takes_latents == takes_latents
    given = torch.zeros(1, 4, 6, 8) if takes_latents else None
    images = None if takes_latents else [Image.new("RGB", (64, 48))]
    (latents,) = fix.enlarged(given, images, 128, 96)
    assert latents.shape == (4, 12, 16)
    vae, told_images, told_latents, dtype, *numbers = made[0][2].told
    assert vae is pipeline.load_autoencoder() and dtype == torch.float32 and numbers == [128, 96, 1, 1]
    assert told_images is images and told_latents is given


def test_what_an_upscaler_gives_must_fit(pipeline, upscaler_module):
    upscaler_module(lambda: Halves(True, torch.ones(1, 4, 5, 5)))
    fix = highres(pipeline, highres_fix_upscaler="own_upscaler")
    with pytest.raises(UserError, match=r"own_upscaler: gave latents \[1, 4, 5, 5\], not \[1, 4, 12, 16\]"):
        fix.enlarged(torch.zeros(1, 4, 6, 8), None, 128, 96)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"highres_fix_scale": 0}, "--highres_fix_scale must be above 0 and at most 1, not 0"),
        ({"highres_fix_scale": 2}, "--highres_fix_scale must be above 0 and at most 1, not 2"),
        ({"highres_fix_steps": 0}, "--highres_fix_steps must be from 1 to 1000, not 0"),
        ({"highres_fix_strength": 1.5}, "--highres_fix_strength must be between 0 and 1, not 1.5"),
        ({"highres_fix_upscaler": "no.such"}, "--highres_fix_upscaler no.such cannot be imported"),
        ({"highres_fix_upscaler": "library.errors"}, "library.errors: the module has no function create_upscaler"),
        ({"highres_fix_upscaler": "own_upscaler", "highres_fix_upscaler_args": "a"}, '"key=value;key=value", not "a"'),
        ({"highres_fix_upscaler": "own_upscaler", "highres_fix_upscaler_args": "a=1"}, "don't fit own_upscaler"),
        ({"highres_fix_upscaler": "tools.latent_upscaler"}, "tools.latent_upscaler needs its file"),
        (
            {"highres_fix_upscaler": "tools.latent_upscaler", "highres_fix_upscaler_args": "weights=none.pt"},
            "tools.latent_upscaler: there is no file none.pt",
        ),
    ],
)
def test_what_cannot_be_is_refused(upscaler_module, options, message):
    upscaler_module(lambda: None)
    with pytest.raises(UserError, match=message):
        highres(None, **options)


def test_options_without_a_scale_have_no_effect(caplog):
    caplog.set_level("INFO", logger="library")
    assert open_highres(HighresOptions(highres_fix_steps=3, highres_fix_save_1st=True), None) is None
    assert "no effect without --highres_fix_scale: --highres_fix_steps, --highres_fix_save_1st" in caplog.text
    assert open_highres(HighresOptions(), None) is None


# ---- tools/latent_upscaler.py ----------------------------------------------------------------------------------------


def test_a_network_that_adds_nothing_is_lanczos(pipeline, tmp_path):
    """``--highres_fix_upscaler tools.latent_upscaler``."""
    images = [Image.effect_mandelbrot((48, 40), (-2, -1.5, x, 1.5), 20).convert("RGB") for x in (1, 2, 3)]
    expected = torch.stack(
        [pipeline.encode_images(from_image(image, 96, 80)[None], None)[0] * pipeline.latent_scale for image in images]
    )
    arguments = f"weights={write_weights(tmp_path / 'none.safetensors')}"
    options = {"highres_fix_upscaler": "tools.latent_upscaler", "highres_fix_upscaler_args": arguments}
    made = torch.stack(highres(pipeline, **options).enlarged(None, images, 96, 80))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    network = latent_upscaler.create_upscaler(str(write_weights(tmp_path / "some.safetensors", 0.01)))
    changed = network.upscale(pipeline.load_autoencoder(), images, None, torch.float32, 96, 80, 2, 1)
    assert (changed - expected).abs().max() > 1e-3
    alone = network.upscale(pipeline.load_autoencoder(), images[2:], None, torch.float32, 96, 80)
    torch.testing.assert_close(alone[0], changed[2], rtol=0, atol=1e-4)


def test_a_file_of_another_network_is_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors holds another network's weights"):
        latent_upscaler.create_upscaler(str(tmp_path / "other.safetensors"))


def test_xl_is_refused(tmp_path):
    network = latent_upscaler.create_upscaler(str(write_weights(tmp_path / "some.safetensors")))

    class Autoencoder:
        config = {"scaling_factor": 0.13025}

    with pytest.raises(UserError, match=r"for Stable Diffusion 1\.x and 2\.x only"):
        network.upscale(Autoencoder(), [], None, torch.float32, 64, 64)


def test_the_program_doubles_images(few_blocks_sd1, tmp_path):
    """``tools/latent_upscaler.py``."""
    Image.new("RGB", (45, 32), (10, 200, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 32), (10, 0, 30)).save(tmp_path / "b.png")
    weights = write_weights(tmp_path / "w.safetensors")
    command = ["--vae_path", few_blocks_sd1, "--weights", weights, "--output_dir", tmp_path / "out", "--debug"]
    latent_upscaler.main([*map(str, command), "--image_pattern", str(tmp_path / "*.png")])
    written = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert written == dict.fromkeys(["a_upscaled.png", "a_lanczos.png", "b_upscaled.png", "b_lanczos.png"], (80, 64))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--vae_path is missing"),
        (["--vae_path", "x", "--weights", "x"], "--image_pattern is missing"),
        (["--vae_path", "x", "--weights", "x", "--image_pattern", "none/*.png"], r"--image_pattern .* matches no file"),
        (["--vae_path", "x", "--weights", "x", "--image_pattern", "x", "--batch_size", "0"], "--batch_size must be"),
    ],
)
def test_the_program_says_what_is_missing(arguments, message):
    with pytest.raises(UserError, match=message):
        latent_upscaler.main(arguments)
