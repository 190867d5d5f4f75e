"""Images with ControlNets are those of diffusers' ControlNet pipelines, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image

from library.generation.control_options import ControlOptions, open_control
from library.generation.features import Batch
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)
from tests.families.stable_diffusion import few_blocks, make_few_blocks
from tools.make_tiny_control import make_tiny_control_net

PROMPT, NEGATIVE = "a big red cat", "small dog"
WIDTH, HEIGHT, SCALE, SEED = 72, 64, 4.0, 11
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIPELINES = {
    "sd1": "StableDiffusionControlNetPipeline",
    "sd2": "StableDiffusionControlNetPipeline",
    "sdxl": "StableDiffusionXLControlNetPipeline",
}


class Pair:
    """The same model and the same two ControlNets in both programs, with a hint image for each."""

    def __init__(self, variant: str, folder: Path):
        self.variant = variant
        shape = few_blocks(variant)
        self.predicts_v = variant == "sd2"
        self.ours = StableDiffusionPipeline(
            StableDiffusionFiles(make_few_blocks(folder / "original", variant)),
            torch.float32,
            "cpu",
            v_parameterization=self.predicts_v,
        )
        self.files = [make_tiny_control_net(folder / f"{i}", variant, seed=i, shape=shape) for i in range(2)]
        folders = [make_tiny_control_net(folder / f"{i}d", variant, "diffusers", i, shape=shape) for i in range(2)]
        self.networks = [diffusers.ControlNetModel.from_pretrained(path) for path in folders]
        pixels = numpy.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=numpy.uint8)
        self.hints = [Image.fromarray(values) for values in pixels]
        self.hint_files = [folder / f"hint{i}.png" for i in range(2)]
        for hint, path in zip(self.hints, self.hint_files):
            hint.save(path)
        model = make_few_blocks(folder / "diffusers", variant, "diffusers")
        self.pipeline = getattr(diffusers, PIPELINES[variant]).from_pretrained(model, controlnet=self.networks[0])
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, steps: int, sampler: str = "ddim", **options: Any) -> torch.Tensor:
        request = StableDiffusionRequest(
            PROMPT, NEGATIVE, width=WIDTH, height=HEIGHT, seed=SEED, sample_steps=steps, scale=SCALE, sampler=sampler
        )
        feature = open_control(ControlOptions(**options), self.ours)
        hook = feature.hook(Batch([], [request], [0], HEIGHT, WIDTH))
        return self.ours.generate_latents(request, hooks=[hook])

    def theirs(self, steps: int, networks: list[int], sampler: str = "ddim", **arguments: Any) -> torch.Tensor:
        chosen, pipeline = [self.networks[i] for i in networks], self.pipeline
        pipeline.controlnet = MultiControlNetModel(chosen) if len(chosen) > 1 else chosen[0]
        prediction = "v_prediction" if self.predicts_v else "epsilon"
        settings = {**SCHEDULE, "steps_offset": 1, "prediction_type": prediction}
        if sampler == "ddim":
            pipeline.scheduler = diffusers.DDIMScheduler(**settings, clip_sample=False)
        else:
            pipeline.scheduler = diffusers.EulerDiscreteScheduler(**settings)
        hints = [self.hints[i] for i in networks]
        return pipeline(
            PROMPT,
            image=hints if len(hints) > 1 else hints[0],
            negative_prompt=NEGATIVE,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=steps,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **arguments,
        ).images


@pytest.fixture(scope="module", params=["sd1", pytest.param("sd2", marks=pytest.mark.thorough), "sdxl"])
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item())


def options(pair: Pair, *models: int, **more: Any) -> dict[str, Any]:
    paths = [str(pair.hint_files[i]) for i in models]
    return {"control_net_models": [str(pair.files[i]) for i in models], "guide_image_path": paths, **more}


def test_one_control_net_with_a_multiplier_and_a_ratio(pair):
    """--control_net_models, --control_net_multipliers, --control_net_ratios, --guide_image_path"""
    ours = pair.draw(4, **options(pair, 0, control_net_multipliers=[0.7], control_net_ratios=[0.5]))
    # Half of four steps: those that begin before or at the half.
    assert_equal(ours, pair.theirs(4, [0], controlnet_conditioning_scale=0.7, control_guidance_end=0.75))


def test_two_control_nets_act_in_turn_and_for_xl_by_their_mean(pair):
    """--control_net_models with several models"""
    ours = pair.draw(2, **options(pair, 0, 1, control_net_multipliers=[1.0, 0.6]))
    if pair.variant == "sdxl":
        theirs = pair.theirs(2, [0, 1], controlnet_conditioning_scale=[0.5, 0.3])
    else:
        first_then_second = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
        theirs = pair.theirs(2, [0, 1], controlnet_conditioning_scale=[1.0, 0.6], **first_then_second)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_a_sampler_that_scales_what_the_models_are_given(pair):
    """--control_net_models with --sampler euler"""
    assert_equal(pair.draw(2, "euler", **options(pair, 0)), pair.theirs(2, [0], "euler"))
