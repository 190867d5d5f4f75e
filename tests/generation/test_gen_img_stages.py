"""``gen_img.py`` from the command line: sampling, start images, Highres. fix, Deep Shrink and Gradual Latent."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gen_img import GenImg, GenImgOptions
from library.errors import UserError
from library.options import parse_options
from tests.generation.drawing import pixels, text_of
from tests.generation.test_highres_fix import write_weights


@pytest.fixture
def draw(request, tmp_path, share_parts):
    """Draw with these options into a new folder, with a model of this kind; the image files by name."""

    def run(*arguments: object, model: str = "sd1") -> list[Path]:
        folder = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        ckpt = request.getfixturevalue(f"few_blocks_{model}")
        command = ["--ckpt", ckpt, "--outdir", folder, "--W", 64, "--H", 64, "--steps", 2, "--seed", 7]
        command += [] if "--from_file" in arguments else ["--prompt", "a red cat"]
        options = parse_options(GenImgOptions, "", [str(argument) for argument in [*command, *arguments]])
        share_parts(GenImg(options)).run()
        return sorted(folder.glob("*.png"))

    return run


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(path)
    return path


@pytest.fixture
def prompt_file(tmp_path):
    def write(*lines: str) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


SHRUNK = "--ds_depth_1 1 --ds_timesteps_1 400"
EULER = "--sampler euler_a --steps 4"
GROWING = f"{EULER} --gradual_latent_timesteps 1000 --gradual_latent_ratio_step 0.25 --gradual_latent_every_n_steps 1"
TWICE = "--W 128 --H 128 --highres_fix_scale 0.5 --highres_fix_steps 2"
CHANGES = [
    ("", "--sampler k_euler_a"),
    ("", "--scale 3"),
    ("", "--steps 3"),
    ("", "--W 72"),
    ("", "--H 72"),
    ("", "--pyramid_noise_prob 1 --pyramid_noise_discount_range 0.8 0.9"),
    ("", "--noise_offset_prob 1 --noise_offset_range 1 2"),
    ("", SHRUNK),
    (SHRUNK, "--ds_timesteps_1 0"),
    (SHRUNK, "--ds_ratio 0.8"),
    (f"{SHRUNK} --ds_timesteps_2 0", "--ds_depth_2 0"),
    (f"{SHRUNK} --ds_depth_2 0", "--ds_timesteps_2 0"),
    (EULER, GROWING),
    (GROWING, "--gradual_latent_timesteps 800"),
    (GROWING, "--gradual_latent_ratio 0.75"),
    (GROWING, "--gradual_latent_ratio_step 0.5"),
    (GROWING, "--gradual_latent_every_n_steps 2"),
    (GROWING, "--gradual_latent_s_noise 0.5"),
    (GROWING, "--gradual_latent_unsharp_params 3,1,1"),
    ("--W 128 --H 128", TWICE),
    (TWICE, "--highres_fix_scale 0.75"),
    (TWICE, "--highres_fix_steps 3"),
    (TWICE, "--highres_fix_latents_upscaling"),
]


@pytest.mark.parametrize("base, options", CHANGES)
def test_an_option_changes_the_image(draw, drawn_once, base, options):
    assert drawn_once(base) != pixels(draw(*base.split(), *options.split())[0])


@pytest.fixture(scope="module")
def images_by_options() -> dict[str, bytes]:
    return {}


@pytest.fixture
def drawn_once(draw, images_by_options):
    """The pixels of an image with these options, which is drawn for the first test that asks for it."""

    def image(options: str, **model: str) -> bytes:
        if options not in images_by_options:
            images_by_options[options] = pixels(draw(*options.split(), **model)[0])
        return images_by_options[options]

    return image


SIZES = "original_height original_width original_height_negative original_width_negative crop_top crop_left"


@pytest.mark.parametrize("option", SIZES.split())
def test_xl_is_told_sizes(draw, drawn_once, option):
    base = "--sampler ddim"
    assert drawn_once(base, model="sdxl") != pixels(draw(*base.split(), f"--{option}", "512", model="sdxl")[0])


@pytest.mark.parametrize(
    "options", [["--dsd1", "1", "--dst1", "400"], ["--glt", "1000", "--gls", "0.5"], ["--t", "0.2"]]
)
def test_a_prompts_options_are_its_own(draw, prompt_file, picture, options):
    """``--dsd1`` and ``--glt`` act on one image of a file and not on its neighbours, in a batch or not."""
    over = ["--image_path", picture] if options[0] == "--t" else []
    plain, own = "a cat --d 1 --s 3", f"a cat --d 1 --s 3 {' '.join(options)}"
    common = ["--sampler", "euler_a", "--sequential_file_name", *over]
    files = draw(*common, "--from_file", prompt_file(plain, own, plain), "--batch_size", "3")
    first, second, third = map(pixels, files)
    assert first == third != second
    alone = draw(*common, "--from_file", prompt_file(own))
    assert pixels(alone[0]) == second


def test_strengths_of_both_stages_with_a_start_image(draw, picture):
    """``--highres_fix_strength`` with ``--image_path``."""
    over = [*TWICE.split(), "--image_path", picture, "--highres_fix_steps", "4"]
    first, second = (draw(*over, "--highres_fix_strength", strength)[0] for strength in ("0.3", "1"))
    assert pixels(first) != pixels(second) and Image.open(first).size == (128, 128)


def test_a_module_enlarges_the_first_image(draw, tmp_path):
    """``--highres_fix_upscaler``, ``--highres_fix_upscaler_args``."""
    weights = write_weights(tmp_path / "upscaler.safetensors", 0.05)
    module = ["--highres_fix_upscaler", "tools.latent_upscaler", "--highres_fix_upscaler_args", f"weights={weights}"]
    (image,) = draw(*TWICE.split(), *module)
    assert text_of(image)["highres-fix"] == "0.5,2,0.8,tools.latent_upscaler"
    assert pixels(image) != pixels(draw(*TWICE.split())[0])


def test_an_image_is_drawn_over(draw, picture):
    """``--image_path``, ``--strength``, ``--mask_path``, ``--force_scheduler_zero_steps_offset``."""
    black = picture.with_name("black.png")
    Image.new("RGB", (64, 64)).save(black)
    over = ["--image_path", picture, "--steps", "4"]
    drawn = draw(*over)
    assert text_of(drawn[0])["start-image"] == "picture.png" and text_of(drawn[0])["strength"] == "0.8"
    seen = {pixels(drawn[0])}
    for options in (["--strength", "0.3"], ["--mask_path", black], ["--mask_image", black, "--steps", "3"]):
        seen.add(pixels(draw(*over, *options)[0]))
    assert len(seen) == 3, "behind a black mask, steps don't count"
    assert pixels(drawn[0]) != pixels(draw(*over, "--force_scheduler_zero_steps_offset")[0])


def test_the_text_of_an_image_names_its_start_noise(draw, picture):
    noise = "--pyramid_noise_prob 0.5 --pyramid_noise_discount_range 0.8 0.9 --noise_offset_prob 1".split()
    noise += "--noise_offset_range -1 2 --force_scheduler_zero_steps_offset".split()
    text = text_of(draw(*noise)[0])
    assert (text["pyramid-noise"], text["noise-offset"]) == ("0.5,0.8,0.9", "1,-1,2")
    over = text_of(draw(*noise, "--image_path", picture)[0])
    assert over["force-scheduler-zero-steps-offset"] == "true" and "noise-offset" not in over
    assert not {"pyramid-noise", "noise-offset", "force-scheduler-zero-steps-offset"} & set(text_of(draw()[0]))


def test_an_image_gives_size_and_prompt(draw, picture, prompt_file, few_blocks_sd1, tmp_path):
    """``--image_path`` without ``--prompt``, with the size of the image."""
    made = draw("--from_file", prompt_file("a red cat --n blurry"))[0]
    command = [
        "--ckpt",
        few_blocks_sd1,
        "--outdir",
        tmp_path / "again",
        "--steps",
        2,
        "--image_path",
        made,
        "--seed",
        1,
    ]
    GenImg(parse_options(GenImgOptions, "", list(map(str, command)))).run()
    (again,) = (tmp_path / "again").glob("*.png")
    text = text_of(again)
    assert (text["prompt"], text["negative-prompt"]) == ("a red cat", "blurry")
    command = ["--ckpt", few_blocks_sd1, "--outdir", tmp_path / "sized", "--steps", 2, "--image_path", picture]
    GenImg(parse_options(GenImgOptions, "", [*map(str, command), "--prompt", "a cat"])).run()
    (sized,) = (tmp_path / "sized").glob("*.png")
    assert Image.open(sized).size == (96, 64)


def test_highres_fix_draws_twice(draw):
    """``--highres_fix_scale``, ``--highres_fix_save_1st``, ``--highres_fix_latents_upscaling``, ``--strength``."""
    common = ["--W", "128", "--H", "128", "--highres_fix_scale", "0.5", "--highres_fix_steps", "2"]
    large, small = sorted(draw(*common, "--highres_fix_save_1st"), key=lambda path: -Image.open(path).size[0])
    assert Image.open(large).size == (128, 128) and Image.open(small).size == (64, 64)
    assert text_of(large)["seed"] == text_of(small)["seed"] == "7"
    assert text_of(large)["highres-fix"] == "0.5,2,0.8,image"
    assert pixels(small) == pixels(draw()[0]), "the first image is the one of that size"
    seen = {pixels(large)}
    for more in (["--highres_fix_latents_upscaling"], ["--strength", "0.4"], ["--highres_fix_latents_upscaling"]):
        seen.add(pixels(draw(*common, *more)[0]))
    assert len(seen) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--W", "100"], "--W must be a positive multiple of 8, not 100"),
        (["--sampler", "eular"], '"eular" is not a sampler'),
        (["--image_path", "no.png"], "--image_path: no.png is neither a file nor a folder"),
        (["--mask_path", "gen_img.py"], "--mask_path: gen_img.py: not an image in a known format"),
        (["--strength", "2"], "--strength must be between 0 and 1, not 2"),
        (["--ds_depth_1", "7"], r"--ds_depth_1 \(--dsd1\) must be from 0 to 1 for this model, not 7"),
        (["--ds_depth_1", "1", "--ds_ratio", "0"], r"--ds_ratio \(--dsr\) must be above 0"),
        (["--highres_fix_scale", "0"], "--highres_fix_scale must be above 0"),
        (["--highres_fix_scale", "0.5", "--highres_fix_upscaler", "no.such"], "no.such cannot be imported"),
        (
            ["--sampler", "euler_a", "--gradual_latent_timesteps", "700", "--gradual_latent_unsharp_params", "4"],
            "--glus",
        ),
        (["--noise_offset_prob", "1"], "--noise_offset_prob needs --noise_offset_range"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_said_before_the_model_loads(draw, options, message):
    with pytest.raises(UserError, match=message):
        draw(*options)


def test_steps_that_a_sampler_cannot_make_are_refused(draw):
    """--zero_terminal_snr of a model that predicts noise, with --sampler dpm_2_a: from 4096 to 0.03 in one step."""
    sentence = "The sampler dpm_2_a cannot make 2 steps along the noise schedule of --zero_terminal_snr"
    with pytest.raises(UserError, match=sentence):
        draw("--zero_terminal_snr", "--sampler", "dpm_2_a", "--steps", "2")
    assert draw("--zero_terminal_snr", "--sampler", "dpm_2_a", "--steps", "3")


def test_a_mask_without_an_image_is_refused(draw, picture):
    with pytest.raises(UserError, match="--mask_path needs --image_path"):
        draw("--mask_path", picture)


def test_gradual_latent_with_another_sampler_has_no_effect(draw, caplog):
    plain = pixels(draw()[0])
    assert pixels(draw("--gradual_latent_timesteps", "1000")[0]) == plain
    assert "Gradual Latent needs --sampler euler_a; it has no effect with ddim" in caplog.text
