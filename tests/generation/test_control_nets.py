"""ControlNet and ControlNet-LLLite in the drawing of images: when each acts, on which hint, and options refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.generation.control_options import ControlOptions, open_control
from library.generation.features import Batch, Feature
from library.generation.image_prompts import ImagePrompt
from library.models.sampling import StepHook
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)
from tests.families.stable_diffusion import few_blocks
from tests.generation.drawing import difference
from tools.make_tiny_control import make_tiny_control_net, make_tiny_lllite

QUICK = StableDiffusionRequest(
    "a red cat", "a dog", width=64, height=64, seed=5, sample_steps=2, scale=3.0, sampler="ddim"
)


def open_pipeline(path: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(path), torch.float32, "cpu")


@pytest.fixture(scope="module")
def sd1(few_blocks_sd1) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sd1)


@pytest.fixture(scope="module")
def sdxl(few_blocks_sdxl) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sdxl)


@pytest.fixture(scope="module")
def plain(sd1, sdxl) -> dict[str, Tensor]:
    """The latents that each model draws without control."""
    return {pipeline.variant: draw(pipeline, None) for pipeline in (sd1, sdxl)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four guide images of single colours, two ControlNets and two LLLite files."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "guides").mkdir()
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index + 10, 0, 0)).save(folder / "guides" / f"{index}.png")
    (folder / "guides" / "notes.txt").write_text("no image")
    for index in range(2):
        make_tiny_control_net(folder / f"net{index}", "sd1", seed=index, shape=few_blocks("sd1"))
        make_tiny_lllite(folder / f"lllite{index}", seed=index, shape=few_blocks("sdxl"))
    return folder


def nets(folder: Path, *indexes: int) -> list[str]:
    return [str(folder / f"net{index}" / "sd1_control.safetensors") for index in indexes]


def lllites(folder: Path, *indexes: int) -> list[str]:
    return [str(folder / f"lllite{index}" / "lllite.safetensors") for index in indexes]


def control(pipeline: StableDiffusionPipeline, folder: Path, **options: Any) -> Feature:
    guides = options.pop("guide_image_path", [str(folder / "guides")])
    feature = open_control(ControlOptions(guide_image_path=guides, **options), pipeline)
    assert feature is not None
    return feature


def draw(pipeline: StableDiffusionPipeline, feature: Feature | None, *numbers: int, **changes: Any) -> Tensor:
    numbers = numbers or (0,)
    requests = [dataclasses.replace(QUICK, seed=5 + number, **changes) for number in numbers]
    height, width = pipeline.image_size(requests[0])
    hook = None if feature is None else feature.hook(Batch([], requests, numbers, height, width))
    return pipeline.generate_latents(*requests, hooks=[] if hook is None else [hook])


def acting_models(pipeline: StableDiffusionPipeline, feature: Any, steps: int, **changes: Any) -> list[list[int]]:
    """Which of the feature's models are called at each step."""
    feature.hook(Batch([], [QUICK], [0], 64, 64))
    calls: list[list[int]] = [[] for _ in range(steps)]
    step = {"index": 0}

    class Count(StepHook):
        def before(self, latents, at):
            step["index"] = at.index
            return latents

    handles = [
        model.register_forward_pre_hook(lambda *_, index=index: calls[step["index"]].append(index))
        for index, model in enumerate(feature.models)
    ]
    hook = feature.hook(Batch([], [QUICK], [0], 64, 64))
    pipeline.generate_latents(
        dataclasses.replace(QUICK, sample_steps=steps, scale=1.0, **changes), hooks=[Count(), hook]
    )
    for handle in handles:
        handle.remove()
    return calls


def test_several_control_nets_act_in_turn_each_up_to_its_ratio(sd1, folder):
    """--control_net_models, --control_net_ratios"""
    feature = control(sd1, folder, control_net_models=nets(folder, 0, 1), control_net_ratios=[0.5])
    # The first one's turns are the even steps, and its ratio ends with step 4 of 8.
    assert acting_models(sd1, feature, 8) == [[0], [1], [0], [1], [0], [1], [], [1]]
    # Of an image that is drawn over, the steps that are made count.
    half = {"start_latents": torch.zeros(4, 8, 8), "strength": 0.5}
    assert acting_models(sd1, feature, 8, **half) == [[], [], [], [], [0], [1], [0], [1]]


def test_a_multiplier_of_zero_and_no_control_net_draw_the_same(sd1, folder, plain):
    """--control_net_multipliers"""
    plain = plain["sd1"]
    off = control(sd1, folder, control_net_models=nets(folder, 0), control_net_multipliers=[0.0])
    assert torch.equal(draw(sd1, off), plain)
    full = control(sd1, folder, control_net_models=nets(folder, 0))
    half = control(sd1, folder, control_net_models=nets(folder, 0), control_net_multipliers=[0.01])
    assert difference(draw(sd1, full), plain) > 10 * difference(draw(sd1, half), plain) > 0


def test_each_image_takes_the_next_hint_alone_and_in_a_batch(sd1, folder):
    """--guide_image_path: image-major, one for each model"""
    feature = control(sd1, folder, control_net_models=nets(folder, 0, 1))
    red = [[feature.hints.image(number, model, 64, 64).getpixel((0, 0))[0] for model in (0, 1)] for number in range(3)]
    assert red == [[10, 70], [130, 190], [10, 70]]
    together = draw(sd1, feature, 0, 1)
    for number in (0, 1):
        assert difference(draw(sd1, feature, number), together[number : number + 1]) < 1e-4
    assert feature.hints.image(0, 0, 32, 16).size == (32, 16), "the size of the stage"


def test_canny_finds_edges_between_its_thresholds(sd1, folder, tmp_path):
    """--control_net_preps canny, canny_TH1_TH2, none"""
    pixels = numpy.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "guide.png")
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    for prep, expected in {
        "canny": cv2.Canny(gray, 63, 191),
        "canny_300_700": cv2.Canny(gray, 300, 700),
        "none": pixels[..., 0],
    }.items():
        feature = control(
            sd1,
            folder,
            control_net_models=nets(folder, 0),
            control_net_preps=[prep],
            guide_image_path=[str(tmp_path / "guide.png")],
        )
        assert numpy.array_equal(numpy.array(feature.hints.image(0, 0, 64, 64))[..., 0], expected), prep


def test_the_second_stage_of_highres_fix_can_be_without_control_nets(sd1, folder):
    """--highres_fix_disable_control_net"""
    options = ControlOptions(control_net_models=nets(folder, 0), guide_image_path=[str(folder / "guides")])
    feature = open_control(options, sd1, first_stage_only=True)
    assert feature is not None
    hooks = [feature.hook(Batch([], [QUICK], [0], 64, 64, stage)) for stage in (0, 1, 2)]
    assert [hook is None for hook in hooks] == [False, False, True]


def test_hints_follow_latents_that_change_their_size(sd1, sdxl, folder, plain):
    """Control for latents of a quarter of the hints' area, as Gradual Latent has them at first."""
    for pipeline, options in (
        (sd1, {"control_net_models": nets(folder, 0)}),
        (sdxl, {"control_net_lllite_models": lllites(folder, 0)}),
    ):
        hook = control(pipeline, folder, **options).hook(Batch([], [QUICK], [0], 128, 128))
        small = pipeline.generate_latents(QUICK, hooks=[hook])
        assert difference(small, draw(pipeline, control(pipeline, folder, **options))) < 0.2
        assert difference(small, plain[pipeline.variant]) > 0


# ---- LLLite ----------------------------------------------------------------------------------------------------------


def test_lllite_changes_the_image_by_its_hint_up_to_its_ratio(sdxl, folder, plain):
    """--control_net_lllite_models"""
    plain = plain["sdxl"]
    model = {"control_net_lllite_models": lllites(folder, 0)}
    drawn = draw(sdxl, control(sdxl, folder, **model))
    other = draw(sdxl, control(sdxl, folder, guide_image_path=[str(folder / "guides" / "3.png")], **model))
    briefly = draw(sdxl, control(sdxl, folder, control_net_ratios=[0.0], **model))
    assert len({latents.numpy().tobytes() for latents in (plain, drawn, other, briefly)}) == 4
    assert torch.equal(draw(sdxl, None), plain), "nothing of it stays in the U-Net"


def test_lllite_with_multiplier_zero_or_without_outputs_is_the_identity(sdxl, folder, plain, tmp_path):
    plain = plain["sdxl"]
    off = control(sdxl, folder, control_net_lllite_models=lllites(folder, 0), control_net_multipliers=[0.0])
    assert torch.equal(draw(sdxl, off), plain)
    stored = load_file(lllites(folder, 0)[0])
    silent = {name: value * 0 if ".up." in name else value for name, value in stored.items()}
    save_file(silent, tmp_path / "silent.safetensors")
    feature = control(sdxl, folder, control_net_lllite_models=[str(tmp_path / "silent.safetensors")])
    assert difference(draw(sdxl, feature), plain) < 1e-6


def test_several_lllites_act_together_the_last_one_first(sdxl, folder):
    feature: Any = control(
        sdxl,
        folder,
        control_net_lllite_models=lllites(folder, 0, 1),
        control_net_multipliers=[0.5, 2.0],
        guide_image_path=[str(folder / "guides" / "2.png")],
    )
    hook: Any = feature.hook(Batch([], [QUICK], [0], 64, 64))
    path = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    layer = sdxl.load("unet").down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 16, layer.in_features, generator=torch.Generator().manual_seed(1))
    hook.latent_size, hook.acting = (8, 8), [1, 0]
    first, second = (model[path] for model in feature.models)
    maps = [module.hint_map(hint, (8, 8)) for module, hint in zip((first, second), hook.hints)]
    inner = x + 2.0 * second(x, maps[1])
    expected = inner + 0.5 * first(inner, maps[0])
    with hook.attached(sdxl.load("unet")):
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(expected, layer.weight, layer.bias))
    together = draw(sdxl, feature, 0, 1)
    assert difference(draw(sdxl, feature, 1), together[1:]) < 1e-4


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_options_that_cannot_be_used_are_refused_before_anything_is_loaded(sd1, folder, tmp_path):
    guides = [str(folder / "guides")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "guide.png").write_bytes(b"no image")
    one = {"control_net_models": nets(folder, 0), "guide_image_path": guides}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**one, "control_net_lllite_models": lllites(folder, 0)}, "cannot be used at the same time"),
        ({"control_net_models": nets(folder, 0)}, "--control_net_models needs hint images"),
        ({**one, "control_net_multipliers": [1.0, 2.0]}, r"more values \(2\) than there are ControlNet models \(1\)"),
        ({**one, "control_net_ratios": [1.5]}, "between 0 and 1, not 1.5"),
        ({**one, "control_net_preps": ["cany"]}, '"cany" is not known'),
        ({**one, "guide_image_path": [str(tmp_path / "no.png")]}, "no.png is neither a file nor a folder"),
        ({**one, "guide_image_path": [str(tmp_path / "empty")]}, "holds no image"),
        ({**one, "guide_image_path": [str(tmp_path / "guide.png")]}, "not an image in a known format"),
        (
            {"control_net_models": nets(folder, 0, 1, 0), "guide_image_path": [f"{guides[0]}/0.png"] * 2},
            "2 images are given for 3 ControlNet models",
        ),
        ({"control_net_ratios": [1.0]}, r"more values \(1\) than there are ControlNet models \(0\)"),
        ({"control_net_lllite_models": lllites(folder, 0), "guide_image_path": guides}, "is for Stable Diffusion XL"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            open_control(ControlOptions(**options), sd1)
    assert open_control(ControlOptions(guide_image_path=guides), sd1) is None


def test_guide_images_that_no_image_gets_are_named(sd1, folder, caplog):
    control(sd1, folder, control_net_models=nets(folder, 0, 1, 0))
    assert "the last 1 of 4 images are not used" in caplog.text


# ---- with other features of the run ----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_weights_in_channels_last_and_half_precision_draw_nearly_the_same(few_blocks_sd1, sd1, folder):
    """--opt_channels_last, --bf16"""
    expected = draw(sd1, control(sd1, folder, control_net_models=nets(folder, 0)))
    pipeline = StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.bfloat16, "cpu")
    pipeline.channels_last = True
    latents = draw(pipeline, control(pipeline, folder, control_net_models=nets(folder, 0)))
    assert difference(latents, expected) < 0.02 * expected.abs().max()


def test_the_text_of_an_image_names_the_files_with_their_multipliers(sd1, sdxl, folder):
    feature = control(sd1, folder, control_net_models=nets(folder, 0, 1), control_net_multipliers=[0.5])
    files = '["sd1_control.safetensors;0.5", "sd1_control.safetensors;1"]'
    assert feature.settings(ImagePrompt()) == {"control-net-models": files}
    feature = control(sdxl, folder, control_net_lllite_models=lllites(folder, 0))
    assert feature.settings(ImagePrompt()) == {"control-net-lllite-models": '["lllite.safetensors;1"]'}
