"""img2img and inpainting of ``gen_img.py``: files, sizes, prompts that images hold, and what the options change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.generation.features import Batch
from library.generation.image_prompts import ImagePrompt
from library.generation.sampling_options import SamplingOptions, check_sampling, default_prompt, request_fields
from library.generation.start_images import StartImageOptions, StartImages, open_start_images
from library.models.pipeline import from_image
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.models.stable_diffusion.start_noise import draw_start
from library.randomness import seeded_generator


@pytest.fixture(scope="module")
def pipeline(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


def save(
    path: Path, size: tuple[int, int] = (64, 64), colour: tuple[int, int, int] = (200, 30, 90), **text: str
) -> str:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key.replace("_", "-"), value)
    Image.new("RGB", size, colour).save(path, **({"pnginfo": info} if path.suffix == ".png" else {}))
    return str(path)


def start_images(
    image: object, mask: object = None, images: int = 1, regional: bool = False, **size: int
) -> StartImages:
    options = StartImageOptions(
        image_path=None if image is None else str(image), mask_path=None if mask is None else str(mask)
    )
    opened = open_start_images(options, SamplingOptions(**size), images, regional)
    assert opened is not None
    return opened


def draw(pipeline: StableDiffusionPipeline, start: StartImages, *numbers: int, **fields: object) -> torch.Tensor:
    prompt = ImagePrompt(
        "a cat", sample_steps=4, seed=5, **{"width": 64, "height": 64, "sample_sampler": "ddim", **fields}
    )
    requests = [pipeline.request(prompt, **request_fields(SamplingOptions())) for _ in numbers]
    batch = Batch([prompt] * len(numbers), requests, list(numbers), 64, 64)
    start.encode(batch, pipeline)
    hook = start.hook(batch)
    return pipeline.generate_latents(*requests, hooks=[] if hook is None else [hook])


def scaled(pipeline: StableDiffusionPipeline, path: Path) -> torch.Tensor:
    return pipeline.encode_images(from_image(Image.open(path), 64, 64)[None], None) * pipeline.latent_scale


# ---- files -----------------------------------------------------------------------------------------------------------


def test_images_of_a_folder_are_taken_by_name_again_and_again(tmp_path):
    """``--image_path``."""
    for name in ("10.png", "2.jpg", "1.webp", "3.jpeg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    start = start_images(tmp_path)
    assert [start.file(number).name for number in range(6)] == [
        "1.webp",
        "10.png",
        "2.jpg",
        "3.jpeg",
        "1.webp",
        "10.png",
    ]


def test_an_image_gives_its_size_as_multiples_of_32(tmp_path, caplog):
    start = start_images(save(tmp_path / "a.png", (210, 130)))
    prompt = start.sized(ImagePrompt(width=512, height=512))
    assert (prompt.width, prompt.height) == (192, 128)
    assert "210x130 is rounded to 192x128" in caplog.text


def test_width_and_height_together_stretch_the_image(tmp_path):
    """``--W`` and ``--H`` with ``--image_path``."""
    path = save(tmp_path / "a.png", (64, 64))
    both = start_images(path, W=128, H=96).sized(ImagePrompt())
    assert (both.width, both.height) == (128, 96)
    one = start_images(path, W=128).sized(ImagePrompt(width=128, height=512))
    assert (one.width, one.height) == (64, 64)


def test_what_has_no_effect_on_a_start_image_is_said(tmp_path, caplog):
    """``--w`` and ``--h`` in a prompt, ``--pyramid_noise_prob``, ``--noise_offset_prob``."""
    caplog.set_level("INFO", logger="library")
    path = save(tmp_path / "a.png")
    start_images(path, W=64, H=64).sized(ImagePrompt(raw_prompt="a cat --w 128"))
    assert not caplog.text
    start = start_images(path)
    start.sized(ImagePrompt(raw_prompt="a cat --n with"))
    assert not caplog.text
    for _ in range(2):
        start.sized(ImagePrompt(raw_prompt="a cat --s 3 --h 128"))
    assert caplog.text.count("--w and --h have no effect on an image that is drawn over") == 1
    open_start_images(StartImageOptions(image_path=path), SamplingOptions(noise_offset_prob=0.5))
    assert "--pyramid_noise_prob and --noise_offset_prob have no effect with --image_path" in caplog.text


def test_prompts_come_from_the_images_text(tmp_path):
    save(tmp_path / "a.png", prompt="a {cat}", negative_prompt="blurry")
    save(tmp_path / "b.png", prompt="a dog")
    start = start_images(tmp_path, images=2)
    assert [line.text for line in start.recorded_lines()] == [r"a \{cat\} --n blurry", "a dog"]
    assert [start.file(number).name for number in range(5)] == ["a.png", "a.png", "b.png", "b.png", "a.png"]
    save(tmp_path / "c.jpg")
    with pytest.raises(UserError, match=r"c\.jpg holds no prompt; give --prompt or --from_file"):
        start_images(tmp_path).recorded_lines()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.png", None, r"--image_path: .*missing\.png is neither a file nor a folder"),
        ("broken.png", b"no image at all", r"--image_path: .*broken\.png: not an image in a known format"),
        ("folder", "folder", r"--image_path: .*folder holds no image \(\.png"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        start_images(path)


def test_an_image_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.png"
    save(path, (200, 200))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"a\.png: cannot read the image"):
        start_images(path).image(0)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_lies_between_0_and_1(strength):
    """``--strength``."""
    with pytest.raises(UserError, match="--strength must be between 0 and 1, not"):
        open_start_images(StartImageOptions(strength=strength), SamplingOptions())


def test_a_mask_needs_an_image_or_regions(tmp_path):
    """``--mask_path``."""
    mask = save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="line 2: --mask_path needs --image_path"):
        start_images(None, mask).check(ImagePrompt("a cat"), "line 2: ")
    start_images(None, mask).check(ImagePrompt("a cat AND a dog"), "")
    start_images(None, mask, regional=True).check(ImagePrompt("a cat"), "")
    assert open_start_images(StartImageOptions(), SamplingOptions()) is None


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_the_less_strength_the_more_of_the_image_is_left(pipeline, tmp_path):
    """``--strength`` and ``--t``."""
    path = tmp_path / "a.png"
    start = start_images(save(path))
    image = scaled(pipeline, path)
    distances = [(draw(pipeline, start, 0, strength=s) - image).abs().mean().item() for s in (0, 0.3, 0.6, 1)]
    assert distances[0] < 1e-6, "strength 0 gives the image itself"
    assert distances == sorted(distances) and distances[1] < 0.7 * distances[3]
    assert torch.equal(draw(pipeline, start, 0), draw(pipeline, start, 0, strength=0.8)), "unset means 0.8"


def test_black_is_kept_and_white_is_drawn_anew(pipeline, tmp_path):
    """``--mask_path``."""
    path = tmp_path / "a.png"
    save(path)
    image = scaled(pipeline, path)
    masks = {}
    for name, colour in (("black", 0), ("white", 255)):
        masks[name] = save(tmp_path / f"{name}.bmp", colour=(colour,) * 3)
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.save(tmp_path / "half.bmp")
    plain = draw(pipeline, start_images(path), 0)
    assert torch.equal(draw(pipeline, start_images(path, masks["white"]), 0), plain)
    assert torch.equal(draw(pipeline, start_images(path, masks["black"]), 0), image)
    mixed = draw(pipeline, start_images(path, tmp_path / "half.bmp"), 0)
    assert torch.equal(mixed[..., 5:], image[..., 5:]), "but for the blurred border"
    assert (mixed[..., :4] - image[..., :4]).abs().mean() > 0.1
    regional = start_images(path, masks["black"], regional=True)
    assert regional.hook(Batch([ImagePrompt("a cat")], [], [0], 64, 64)) is not None, "also with networks"
    assert regional.hook(Batch([ImagePrompt("a cat AND a dog")], [], [0], 64, 64)) is None


def test_each_image_of_a_batch_has_its_own_start(pipeline, tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", colour=(0, 255, 20))
    start = start_images(tmp_path)
    together = draw(pipeline, start, 0, 1)
    for number in (0, 1):
        torch.testing.assert_close(together[number], draw(pipeline, start, number)[0], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("forced, level, told", [(False, 501, 401), (True, 401, 401)])
def test_a_forced_offset_of_zero_begins_at_the_noise_of_the_first_step(pipeline, forced, level, told):
    """``--force_scheduler_zero_steps_offset``: without it, an image gets more noise than the first step expects."""
    fields = request_fields(SamplingOptions(force_scheduler_zero_steps_offset=forced))
    prompt = ImagePrompt("", sample_steps=10, width=64, height=64, strength=0.5)
    request = pipeline.request(prompt, sampler="ddim", start_latents=torch.zeros(4, 8, 8), **fields)
    solver = pipeline.solver(request)
    first = pipeline.first_step(request, solver)
    noise = torch.ones(1, 4, 8, 8)
    assert int(solver.timesteps[first]) == told
    amplitude = (1 - solver.scheduler.alphas_cumprod[level]) ** 0.5
    assert torch.allclose(solver.start(noise, torch.zeros_like(noise), first), amplitude * noise)


# ---- options and noise -----------------------------------------------------------------------------------------------


def test_the_command_line_is_a_prompt():
    """``--W``, ``--H``, ``--steps``, ``--sampler``, ``--scale``, ``--negative_scale``, ``--crop_top`` and so on."""
    options = SamplingOptions(W=640, steps=7, sampler="k_lms", scale=3, negative_scale=2, crop_top=8, crop_left=16)
    options.original_height, options.original_width_negative = 900, 70
    prompt = default_prompt(options, "sd1", StartImageOptions(strength=0.4))
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.sample_sampler) == (640, 512, 7, "k_lms")
    assert (prompt.scale, prompt.negative_scale, prompt.crop_top, prompt.crop_left, prompt.strength) == (
        3,
        2,
        8,
        16,
        0.4,
    )
    assert (prompt.original_height, prompt.original_width, prompt.original_width_negative) == (900, None, 70)
    assert default_prompt(SamplingOptions(), "sdxl").width == 1024


@pytest.mark.parametrize(
    "values, message",
    [
        ({"W": 100}, "--W must be a positive multiple of 8, not 100"),
        ({"H": 0}, "--H must be a positive multiple of 8, not 0"),
        ({"pyramid_noise_prob": 1.2}, "--pyramid_noise_prob must be between 0 and 1, not 1.2"),
        ({"pyramid_noise_prob": 1}, "--pyramid_noise_prob needs --pyramid_noise_discount_range with two numbers"),
        ({"noise_offset_prob": 1, "noise_offset_range": [1]}, "--noise_offset_range takes two numbers, not 1"),
        ({"pyramid_noise_discount_range": [-1, 1]}, "--pyramid_noise_discount_range must not be negative"),
    ],
)
def test_values_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        check_sampling(SamplingOptions(**values))


def test_pyramid_noise_has_coarser_grids():
    """``--pyramid_noise_prob``, ``--pyramid_noise_discount_range``."""

    def noise(seed: int, probability: float) -> torch.Tensor:
        return draw_start((4, 32, 32), seeded_generator(seed), (probability, 0.8, 0.9))

    def roughness(item: torch.Tensor) -> float:
        return (item[:, 1:] - item[:, :-1]).square().mean().item()

    pyramid = noise(1, 1.0)
    assert pyramid.std().item() == pytest.approx(1, abs=1e-5)
    assert roughness(pyramid) < 0.8 * roughness(noise(1, 0.0)), "neighbours resemble each other"
    happened = sum(roughness(noise(seed, 0.5)) < 1.5 for seed in range(40))
    assert 8 <= happened <= 32


def test_a_noise_offset_shifts_all_of_the_noise():
    """``--noise_offset_prob``, ``--noise_offset_range``."""
    plain = draw_start((4, 8, 8), seeded_generator(2))
    shifts = [draw_start((4, 8, 8), seeded_generator(seed), offset=(1.0, 3.0, 3.5)) for seed in range(20)]
    shift = shifts[2] - plain
    assert (shift - shift.mean()).abs().max() < 1e-5
    assert 2 < sum(item.mean().item() for item in shifts) / 20 < 4


def test_an_image_to_draw_over_gets_noise_after_that_of_the_steps():
    generator = seeded_generator(3)
    draws = [torch.randn(4, 8, 8, generator=generator) for _ in range(6)]
    assert torch.equal(draw_start((4, 8, 8), seeded_generator(3)), draws[0])
    assert torch.equal(draw_start((4, 8, 8), seeded_generator(3), skipped=4), draws[5])
