"""Guidance by CLIP and VGG16: gradients, losses that fall, aims, and options refused; CLIP vision conditioning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.generation.clip_models import cropped, normalised
from library.generation.features import Batch, Feature
from library.generation.guidance_options import GuidanceOptions, open_clip_vision, open_guidance, vgg16_file
from library.generation.guide_images import pixels
from library.generation.image_guidance import GuideHook
from library.generation.image_prompts import ImagePrompt
from library.generation.vgg_guidance import Vgg16
from library.models.sampling import ClassifierFree, DiffusersSolver, Step
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)
from library.models.stable_diffusion.sampling import make_scheduler
from tests.generation.drawing import difference
from tools.make_tiny_control import make_tiny_clip, make_tiny_clip_vision, make_tiny_vgg16

PROMPT = ImagePrompt(prompt="a (red:1.4) cat", sample_sampler="ddim")
SCALES = {"clip_guidance_scale": 30.0, "clip_image_guidance_scale": 30.0, "vgg16_guidance_scale": 30000.0}
"""A narrow VGG16 with random weights gives small numbers."""


def open_pipeline(path: Path, **arguments: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(path), torch.float32, "cpu", **arguments)


@pytest.fixture(scope="module")
def sd1(few_blocks_sd1) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sd1)


@pytest.fixture(scope="module")
def sdxl(few_blocks_sdxl) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sdxl)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two guide images, a CLIP, and a VGG16."""
    folder = tmp_path_factory.mktemp("guidance")
    (folder / "guides").mkdir()
    for index in range(2):
        values = numpy.random.default_rng(index).integers(0, 256, (40, 56, 3), dtype=numpy.uint8)
        Image.fromarray(values).save(folder / "guides" / f"{index}.png")
    make_tiny_clip(folder / "clip")
    make_tiny_vgg16(folder)
    return folder


def options(folder: Path, **more: Any) -> GuidanceOptions:
    return GuidanceOptions(clip_model=str(folder / "clip"), vgg16_weights=str(folder / "vgg16.pth"), **more)


def guide(pipeline: StableDiffusionPipeline, folder: Path, guides: Sequence[str] | None = None, **more: Any) -> Feature:
    paths = [str(folder / "guides")] if guides is None else list(guides)
    (feature,) = open_guidance(options(folder, **more), paths, pipeline)
    return feature


def batch(*numbers: int, sampler: str = "ddim", side: int = 64) -> Batch:
    requests = [
        StableDiffusionRequest(
            PROMPT.prompt, "", width=side, height=side, seed=5 + n, sample_steps=2, scale=2.0, sampler=sampler
        )
        for n in numbers
    ]
    return Batch([PROMPT] * len(numbers), requests, numbers, side, side)


def draw(pipeline: StableDiffusionPipeline, drawn: Batch, feature: Feature | None) -> Tensor:
    hook = None if feature is None else feature.hook(drawn)
    return pipeline.generate_latents(*drawn.requests, hooks=[] if hook is None else [hook])


# ---- the arithmetic --------------------------------------------------------------------------------------------------

LATENTS = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
AIM = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) / 8 + 0.5


def loss_of(images: Tensor) -> Tensor:
    return (images - AIM.to(images)).square().mean(dim=(1, 2, 3))


def predict(latents: Tensor, step: Step, roles: Sequence[str]) -> list[Tensor]:
    return [0.3 * latents.sin() + (0.1 if role == "positive" else 0.0) for role in roles]


def corrected(sampler: str, index: int = 2, v: bool = False, scale: float = 5.0) -> tuple[Any, Tensor, Tensor, Step]:
    """Solver, latents and prediction after one guided step of a model and decoder made of formulas."""
    solver = DiffusersSolver(make_scheduler(sampler, v_prediction=v), 8)
    hook = GuideHook(lambda latents: 0.2 * latents, loss_of, scale)
    wrapped = hook.solver(solver)
    step = Step(index, 8, solver.timesteps[index])
    hook.before(LATENTS, step)
    prediction = hook.guidance(ClassifierFree(2.0))(predict, wrapped.model_input(LATENTS, step), step)
    given: list[Tensor] = []
    solver.advance = lambda prediction, latents, *_: given.append(latents)  # type: ignore[method-assign]
    wrapped.advance(prediction, LATENTS, step, ())
    return solver, given[0], prediction, step


def finite_differences(function: Any) -> Tensor:
    """The gradient of a function of the latents, in float64."""
    gradient = torch.zeros(LATENTS.numel(), dtype=torch.float64)
    for index in range(LATENTS.numel()):
        change = torch.zeros(LATENTS.numel(), dtype=torch.float64)
        change[index] = 1e-5
        at = [function(LATENTS.double() + sign * change.reshape(LATENTS.shape)) for sign in (1, -1)]
        gradient[index] = (at[0] - at[1]) / 2e-5
    return gradient.reshape(LATENTS.shape)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_the_prediction_is_corrected_by_the_gradient_of_the_loss(sampler):
    solver, latents, prediction, step = corrected(sampler)
    alpha = float(solver.scheduler.alphas_cumprod[int(step.timestep)])

    def loss(x: Tensor) -> Tensor:
        noise = 0.3 * x.sin() + 0.1
        clean = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        seen = clean * (1 - alpha) ** 0.5 + x * (1 - (1 - alpha) ** 0.5)
        return 5.0 * loss_of((0.2 * seen / 2 + 0.5).clamp(0, 1)).sum()

    free = 0.3 * LATENTS.sin() + 2.0 * 0.1
    expected = free + (1 - alpha) ** 0.5 * finite_differences(loss)
    torch.testing.assert_close(prediction.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(latents, LATENTS) and difference(prediction, free) > 1e-4


def test_lms_has_its_latents_corrected_and_its_prediction_not():
    solver, latents, prediction, step = corrected("lms")
    sigma = float(solver.scheduler.sigmas[step.index])
    inner = (sigma**2 + 1) ** 0.5

    def loss(x: Tensor) -> Tensor:
        seen = x - sigma * (0.3 * (x / inner).sin() + 0.1)
        return 5.0 * loss_of((0.2 * seen / 2 + 0.5).clamp(0, 1)).sum()

    expected = LATENTS - sigma**2 * finite_differences(loss)
    torch.testing.assert_close(latents.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prediction, 0.3 * (LATENTS / inner).sin() + 0.2)
    assert difference(latents, LATENTS) > 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "lms"])
def test_a_model_that_predicts_v_is_led_as_one_that_predicts_noise(sampler):
    results = {}
    for v in (True, False):
        solver = DiffusersSolver(make_scheduler(sampler, v_prediction=v), 8)
        step = Step(2, 8, solver.timesteps[2])
        alpha = float(solver.scheduler.alphas_cumprod[int(step.timestep)])
        if sampler == "lms":  # its model is given x as the schedule knows it: scaled to unit variance
            alpha = 1 / (float(solver.scheduler.sigmas[2]) ** 2 + 1)
        hook = GuideHook(lambda latents: 0.2 * latents, loss_of, 5.0)
        x = hook.solver(solver).model_input(LATENTS, step)
        hook.before(LATENTS, step)
        prediction = hook.guidance(ClassifierFree(2.0))(v_or_noise(alpha, v), x, step)
        noise = alpha**0.5 * prediction + (1 - alpha) ** 0.5 * x if v else prediction
        results[v] = noise, torch.zeros(1) if hook.shift is None else hook.shift
    torch.testing.assert_close(results[True][0], results[False][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[True][1], results[False][1], rtol=1e-3, atol=1e-4)


def v_or_noise(alpha: float, v: bool) -> Any:
    """A model of one formula for the noise, which gives v or the noise."""

    def model(inputs: Tensor, step: Step, roles: Sequence[str]) -> list[Tensor]:
        noise = 0.3 * inputs.sin()
        clean = (inputs - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        return [alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean if v else noise for _ in roles]

    return model


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", SCALES)
def test_guidance_lowers_its_own_loss(sd1, folder, option):
    """--clip_guidance_scale, --clip_image_guidance_scale, --vgg16_guidance_scale, --guide_image_path"""
    for sampler in ("ddim", "pndm", "lms") if option == "vgg16_guidance_scale" else ("ddim",):
        feature: Any = guide(sd1, folder, **{option: SCALES[option]})
        drawn = batch(1, sampler=sampler)
        losses = [
            feature.loss(drawn)(sd1.decode_latents(draw(sd1, drawn, used)) / 2 + 0.5).item() for used in (None, feature)
        ]
        assert losses[1] < 0.99 * losses[0], sampler
    feature.scale = 0.0
    assert difference(draw(sd1, drawn, feature), draw(sd1, drawn, None)) < 1e-5


def test_the_same_image_alone_and_in_a_batch(sd1, folder):
    for option in ("clip_image_guidance_scale", "vgg16_guidance_scale"):
        feature = guide(sd1, folder, **{option: SCALES[option]})
        together = draw(sd1, batch(0, 1), feature)
        assert difference(draw(sd1, batch(1), feature), together[1:]) < 1e-3


def test_features_of_texts_and_images_are_those_of_transformers(sd1, folder):
    """--clip_model, --c: the prompt without its weights, or another text"""
    feature: Any = guide(sd1, folder, clip_guidance_scale=1.0)
    module = feature.clip.module
    tokens = sd1.tokenizer("text_encoder")("a red cat", padding="max_length", max_length=77, return_tensors="pt")
    expected = module.get_text_features(tokens.input_ids).pooler_output
    torch.testing.assert_close(feature.clip.of_texts([PROMPT.prompt]), expected / expected.norm())
    images = torch.rand(1, 3, 32, 32)
    seen = module.get_image_features(normalised(images)).pooler_output
    distance = 2 * (((seen / seen.norm()) - expected / expected.norm()).norm() / 2).arcsin() ** 2
    torch.testing.assert_close(feature.loss(batch(0))(images), distance[None])
    other = dataclasses.replace(batch(0), prompts=[dataclasses.replace(PROMPT, clip_prompt="a dog")])
    assert difference(feature.loss(other)(images), distance[None]) > 1e-4


def test_the_last_image_is_the_aim_where_there_is_no_guide(sd1, folder):
    feature: Any = guide(sd1, folder, [], clip_image_guidance_scale=1.0)
    assert feature.hook(batch(0)) is None, "nothing has been drawn"
    with Image.open(folder / "guides" / "1.png") as image:
        feature.drawn(batch(0), [Image.new("RGB", (8, 8)), image.convert("RGB")])
    by_file = guide(sd1, folder, [str(folder / "guides" / "1.png")], clip_image_guidance_scale=1.0)
    feature.drawn(dataclasses.replace(batch(0), stage=1), [Image.new("RGB", (8, 8))])  # of Highres. fix: not finished
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(feature.loss(batch(1))(images), by_file.loss(batch(1))(images))  # type: ignore[attr-defined]


def test_vgg16_has_torchvisions_layers(folder):
    """--vgg16_weights, --vgg16_guidance_layer"""
    state = torch.load(folder / "vgg16.pth")
    x = torch.rand(1, 3, 40, 40)
    outputs = {
        layer: Vgg16(folder / "vgg16.pth", layer).load(torch.float32, "cpu")(x) for layer in (0, 1, 4, 19, 20, 30)
    }

    def convolved(x: Tensor, *layers: int) -> Tensor:
        for layer in layers:
            x = torch.nn.functional.conv2d(
                x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1
            ).relu()
        return x

    first = convolved(x, 0, 2)
    assert torch.equal(outputs[0].relu(), outputs[1])
    third = torch.max_pool2d(convolved(torch.max_pool2d(first, 2), 5, 7), 2)
    fourth = convolved(torch.max_pool2d(convolved(third, 10, 12, 14), 2), 17, 19)
    torch.testing.assert_close(outputs[4], torch.max_pool2d(first, 2))
    torch.testing.assert_close(outputs[20], fourth)
    torch.testing.assert_close(outputs[19].relu(), fourth)
    assert outputs[30].shape == (1, 8, 1, 1)


# ---- CLIP vision -----------------------------------------------------------------------------------------------------


def test_what_clip_sees_takes_the_place_of_the_pooled_text_of_the_prompt_alone(sdxl, tmp_path):
    """--clip_vision_strength, --clip_vision_model"""
    model = str(make_tiny_clip_vision(tmp_path))
    image = Image.fromarray(numpy.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=numpy.uint8))
    options = GuidanceOptions(clip_vision_strength=0.7, clip_vision_model=model)
    feature: Any = open_clip_vision(options, sdxl, lambda number: image)
    drawn = batch(0, 1)
    latents = draw(sdxl, drawn, feature)
    seen = feature.model.module(normalised(pixels(cropped(image, 32))[None])).image_embeds
    conditioning = {**sdxl.encode_prompts([PROMPT.prompt]), "pool2": 0.7 * seen}
    given = [dataclasses.replace(request, conditioning=conditioning) for request in drawn.requests]
    assert difference(latents, sdxl.generate_latents(*given)) < 1e-5
    assert difference(latents, draw(sdxl, drawn, None)) > 1e-3
    # The second stage of Highres. fix looks at what the first one has drawn.
    first = dataclasses.replace(batch(0), stage=1)
    feature.drawn(first, [Image.new("RGB", (64, 64), "red")])
    second = feature.hook(dataclasses.replace(batch(0), stage=2))
    assert difference(second.pooled, 0.7 * seen) > 1e-3


def test_images_are_prepared_as_clips_own_processor_does(sdxl):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = Image.fromarray(numpy.random.default_rng(3).integers(0, 256, (90, 57, 3), dtype=numpy.uint8))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = torch.as_tensor(numpy.array(processor(image)["pixel_values"][0]))
    assert difference(normalised(pixels(cropped(image, 32))), theirs) < 0.02


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_guidance_refuses_samplers_that_have_no_way_for_it(sd1, folder):
    for option, scale in SCALES.items():
        feature = guide(sd1, folder, **{option: scale})
        for sampler in ("ddim", "pndm", "lms", "k_lms"):
            feature.check(dataclasses.replace(PROMPT, sample_sampler=sampler), "")
        with pytest.raises(UserError, match=f"line 3: --{option} works with the samplers ddim, pndm and lms"):
            feature.check(dataclasses.replace(PROMPT, sample_sampler="euler_a"), "line 3: ")


def test_options_that_cannot_be_used_are_refused_before_anything_is_loaded(sd1, sdxl, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    guides = [str(folder / "guides")]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "half.pth")
    vgg = {"vgg16_guidance_scale": 1.0}
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        (vgg, [], "needs an image to aim at: name it with --guide_image_path"),
        ({**vgg, "vgg16_weights": None}, guides, "needs VGG16's weights, which are not downloaded"),
        ({**vgg, "vgg16_weights": str(tmp_path / "no.pth")}, guides, "--vgg16_weights: .*no.pth does not exist"),
        ({**vgg, "vgg16_weights": str(tmp_path / "half.pth")}, guides, "does not hold VGG16"),
        ({**vgg, "vgg16_guidance_layer": 31}, guides, "must be between 0 and 30, not 31"),
        (vgg, [str(tmp_path / "no.png")], "--guide_image_path: .*no.png is neither a file nor a folder"),
        ({"clip_guidance_scale": -1.0}, guides, "--clip_guidance_scale must not be negative"),
        ({"clip_guidance_scale": 1.0, "clip_model": str(tmp_path / "no")}, guides, "--clip_model: .* does not exist"),
        ({"clip_guidance_scale": 1.0, "clip_model": str(tmp_path)}, guides, "of the kind bert, where a CLIP is needed"),
        ({"clip_guidance_scale": 1.0, "clip_model": str(folder)}, guides, "it has no config.json"),
    ]
    for values, paths, message in cases:
        given = {"clip_model": str(folder / "clip"), "vgg16_weights": str(folder / "vgg16.pth"), **values}
        with pytest.raises(UserError, match=message):
            open_guidance(GuidanceOptions(**given), paths, sd1)
    assert open_guidance(GuidanceOptions(), [str(tmp_path / "no.png")], sd1) == []
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    cached.write_bytes(b"")
    assert vgg16_file(None) == cached, "torch's own cache"
    vision = GuidanceOptions(clip_vision_strength=1.0, clip_vision_model=str(folder / "clip"))
    with pytest.raises(UserError, match="for Stable Diffusion XL only"):
        open_clip_vision(vision, sd1, lambda number: Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match="needs start images: name them with --image_path"):
        open_clip_vision(vision, sdxl, None)
    with pytest.raises(UserError, match="gives 24 values of an image, where the pooled text has 80"):
        open_clip_vision(vision, sdxl, lambda number: Image.new("RGB", (8, 8)))


def test_a_model_on_the_hub_is_announced_and_missed_in_one_sentence(sd1, folder, caplog):
    caplog.set_level("INFO")
    feature: Any = guide(sd1, folder, clip_guidance_scale=1.0)
    (feature,) = open_guidance(GuidanceOptions(clip_guidance_scale=1.0, clip_model="nobody/clip"), [], sd1)
    with pytest.raises(UserError, match="--clip_model: nobody/clip cannot be read") as caught:
        feature.hook(batch(0))
    assert "nobody/clip comes from the Hugging Face hub" in caplog.text and "\n" not in str(caught.value)
