"""gen_img.py with ControlNets and guidance: what their options do to an image, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from gen_img import GenImg, GenImgOptions
from library.errors import UserError
from library.generation.clip_models import cropped
from library.generation.fitting import phases_of
from library.options import parse_options
from tests.families.stable_diffusion import few_blocks
from tests.generation.drawing import pixels, text_of
from tools.make_tiny_control import (
    make_tiny_clip,
    make_tiny_clip_vision,
    make_tiny_control_net,
    make_tiny_lllite,
    make_tiny_vgg16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A guide image, and one of each model."""
    folder = tmp_path_factory.mktemp("models")
    values = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(values).save(folder / "guide.png")
    make_tiny_control_net(folder, "sd1", shape=few_blocks("sd1"))
    make_tiny_lllite(folder, shape=few_blocks("sdxl"))
    make_tiny_clip(folder / "clip")
    make_tiny_clip_vision(folder / "vision")
    make_tiny_vgg16(folder)
    return folder


@pytest.fixture
def draw(few_blocks_sd1, few_blocks_sdxl, share_parts, tmp_path):
    """Draw with these options, of which the first is the model's family; the last image's file."""

    def run(variant: str, *arguments: object) -> Path:
        before = set(tmp_path.glob("*.png"))
        model = {"sd1": few_blocks_sd1, "sdxl": few_blocks_sdxl}[variant]
        command = [
            *("--ckpt", model, "--W", 64, "--H", 64, "--steps", 2, "--scale", 3, "--seed", 1, "--outdir", tmp_path),
            *("--device", "cpu", *(() if "--prompt" in arguments else ("--prompt", "a red cat --n dog")), *arguments),
        ]
        share_parts(GenImg(parse_options(GenImgOptions, "", [str(word) for word in command]))).run()
        return max(set(tmp_path.glob("*.png")) - before, key=lambda path: path.stat().st_mtime_ns)

    return run


def test_control_nets(draw, folder):
    """--control_net_models, --control_net_weights, --control_net_preps, --guide_image_path; with " AND " too"""
    model = ("--control_net_models", folder / "sd1_control.safetensors", "--guide_image_path", folder / "guide.png")
    plain, controlled = draw("sd1"), draw("sd1", *model)
    half, edges = draw("sd1", *model, "--control_net_weights", 0.5), draw("sd1", *model, "--control_net_preps", "canny")
    assert len(set(map(pixels, (plain, controlled, half, edges)))) == 4
    assert text_of(half)["control-net-models"] == '["sd1_control.safetensors;0.5"]'
    parts = ("--prompt", "a red cat AND a dog --n dog")
    assert pixels(draw("sd1", *parts, *model)) != pixels(draw("sd1", *parts))


def test_the_second_stage_of_highres_fix_with_and_without_control_nets(draw, folder):
    """--highres_fix_disable_control_net"""
    model = ("--control_net_models", folder / "sd1_control.safetensors", "--guide_image_path", folder / "guide.png")
    stages = ("--H", 128, "--W", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2)
    images = [
        draw("sd1", *stages),
        draw("sd1", *stages, *model),
        draw("sd1", *stages, *model, "--highres_fix_disable_control_net"),
    ]
    assert len(set(map(pixels, images))) == 3


def test_lllite_and_clip_vision(draw, folder, monkeypatch):
    """--control_net_lllite_models, --clip_vision_strength, --clip_vision_model"""
    model = ("--control_net_lllite_models", folder / "lllite.safetensors", "--guide_image_path", folder / "guide.png")
    start = ("--image_path", folder / "guide.png")
    vision = (*start, "--clip_vision_strength", 1.0, "--clip_vision_model", folder / "vision")
    images = [draw("sdxl", *options) for options in ((), model, start, vision)]
    assert len(set(map(pixels, images))) == 4
    assert text_of(images[-1])["clip-vision-strength"] == "1"
    stages = ("--H", 128, "--W", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2)
    looked_at = []

    def keep(image: Image.Image, side: int) -> Image.Image:
        looked_at.append(image.tobytes())
        return cropped(image, side)

    monkeypatch.setattr("library.generation.clip_vision.cropped", keep)
    draw("sdxl", *stages, *vision, "--highres_fix_save_1st")
    with Image.open(folder / "guide.png") as guide:
        assert looked_at[0] == guide.tobytes()
    assert len(looked_at) == 2 and len(looked_at[1]) == len(looked_at[0]) and looked_at[1] != looked_at[0]


def test_guidance(draw, folder):
    """--clip_guidance_scale with --c, --clip_image_guidance_scale, --vgg16_guidance_scale, --vgg16_guidance_layerP"""
    clip = ("--clip_model", folder / "clip", "--guide_image_path", folder / "guide.png")
    vgg = ("--guide_image_path", folder / "guide.png", "--vgg16_weights", folder / "vgg16.pth")
    images = [
        draw("sd1"),
        draw("sd1", *clip, "--clip_guidance_scale", 100),
        draw("sd1", *clip, "--clip_guidance_scale", 100, "--prompt", "a red cat --n dog --c a big circle"),
        draw("sd1", *clip, "--clip_image_guidance_scale", 100),
        draw("sd1", *vgg, "--vgg16_guidance_scale", 1e6, "--vgg16_guidance_layerP", 3),
    ]
    assert len(set(map(pixels, images))) == len(images)
    sliced = draw("sd1", *clip, "--clip_guidance_scale", 100, "--vae_slices", 4)
    assert max(abs(a - b) for a, b in zip(pixels(sliced), pixels(images[1]))) <= 1
    assert text_of(images[2])["clip-guidance-scale"] == "100" and text_of(images[2])["clip-prompt"] == "a big circle"


def test_clip_image_guidance_without_a_guide_leads_to_the_image_before(draw, folder):
    """--clip_image_guidance_scale without --guide_image_path"""
    clip = ("--clip_model", folder / "clip", "--clip_image_guidance_scale", 100)
    second = ("--n_iter", 2, "--prompt", "a red cat --d 4")
    assert pixels(draw("sd1", *second, *clip)) != pixels(draw("sd1", *second))


@pytest.mark.parametrize(
    "variant, names",
    [
        ("sd1", ("control", "clip", "vgg")),
        pytest.param("sdxl", ("lllite", "vision"), marks=pytest.mark.thorough),
    ],
)
def test_models_of_features_are_counted_and_rest_in_system_ram(draw, folder, monkeypatch, variant, names):
    """--offload and --vram_budget with models beside the pipeline's parts"""
    guide = folder / "guide.png"
    options = {
        "control": ("--control_net_models", folder / "sd1_control.safetensors", "--guide_image_path", guide),
        "clip": ("--clip_model", folder / "clip", "--clip_guidance_scale", 100, "--clip_image_guidance_scale", 100),
        "vgg": ("--vgg16_weights", folder / "vgg16.pth", "--vgg16_guidance_scale", 10),
        "lllite": ("--control_net_lllite_models", folder / "lllite.safetensors", "--guide_image_path", guide),
        "vision": ("--clip_vision_model", folder / "vision", "--clip_vision_strength", 1, "--image_path", guide),
    }
    runs: list[GenImg] = []
    moved: dict[int, Any] = {}
    start, to = GenImg.run, torch.nn.Module.to

    def noted_run(run: GenImg) -> None:
        runs.append(run)
        start(run)

    def noted_move(module: torch.nn.Module, *where: Any, **more: Any) -> torch.nn.Module:
        moved[id(module)] = where[0] if where else None
        return to(module, *where, **more)

    monkeypatch.setattr(GenImg, "run", noted_run)
    monkeypatch.setattr(torch.nn.Module, "to", noted_move)
    draw(variant, *(word for name in names for word in options[name]), "--offload")
    (run,) = runs
    models = {id(model): model for feature in run.features for model in feature.loaded}
    sizes = [weight.numel() * weight.element_size() for model in models.values() for weight in model.parameters()]
    assert run.feature_bytes == sum(sizes) > 0
    assert {moved[model] for model in models} == {"cpu"}, "where they rest; they work on torch.device('cpu')"
    phases = phases_of(run, run.file_prompts[0])
    assert all("features" in phase.works or "features" in phase.beside for phase in phases)


def test_what_cannot_act_is_refused_before_anything_is_loaded(draw, folder):
    guide = ("--guide_image_path", folder / "guide.png")
    control = ("--control_net_models", folder / "sd1_control.safetensors")
    clip = ("--clip_guidance_scale", 100, "--clip_model", folder / "clip")
    for arguments, message in {
        (*control, *guide, "--control_net_lllite_models", "x"): "cannot be used at the same time",
        control: "needs hint images",
        (*control, *guide, "--ds_depth_1", 1): "--control_net_models cannot be used together with --ds_depth_1",
        (*control, *guide, "--prompt", "a cat --dsd1 1"): "--control_net_models cannot be used together with --ds_de",
        (*clip, "--sampler", "euler"): "works with the samplers ddim, pndm and lms only, not with euler",
        ("--clip_vision_strength", 1): "for Stable Diffusion XL only",
    }.items():
        with pytest.raises(UserError, match=message):
            draw("sd1", *arguments)
    lllite = ("--control_net_lllite_models", folder / "lllite.safetensors", *guide)
    with pytest.raises(UserError, match="--control_net_lllite_models cannot be used together with --ds_depth_1"):
        draw("sdxl", *lllite, "--ds_depth_1", 1)
