"""--negative_scale: guidance from the empty prompt, away from the negative one; and XL's sizes for each role."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from library.models.sampling import ClassifierFree, ModelCall, NegativeScale, Step, StepHook
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)

QUICK = StableDiffusionRequest("a red cat", "a dog", width=64, height=64, seed=5, sample_steps=2, scale=3.0)
STEP = Step(0, 1, torch.tensor(500))


@pytest.fixture(scope="module")
def sd1(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


@pytest.fixture(scope="module")
def sdxl(few_blocks_sdxl) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sdxl), torch.float32, "cpu")


def latents(pipeline: StableDiffusionPipeline, hook: StepHook | None = None, **changes: Any) -> Tensor:
    hooks = [] if hook is None else [hook]
    return pipeline.generate_latents(dataclasses.replace(QUICK, **changes), hooks=hooks)


def test_the_formula():
    predictions = {
        role: torch.randn(2, 4, 3, 3, dtype=torch.float64) for role in ("negative", "positive", "unconditional")
    }
    for scale, negative_scale in ((7.5, 2.0), (1.5, -1.0), (3.0, 0.0)):
        guided = NegativeScale(scale, negative_scale)(
            lambda latents, step, roles: [predictions[role] for role in roles], torch.zeros(2, 4, 3, 3), STEP
        )
        n, c, u = predictions.values()
        torch.testing.assert_close(guided, (1 - scale + negative_scale) * u + scale * c - negative_scale * n)


@pytest.mark.parametrize("pipeline", ["sd1", "sdxl"])
def test_an_empty_negative_prompt_is_plain_guidance_whatever_the_negative_scale(request, pipeline):
    pipeline = request.getfixturevalue(pipeline)
    plain = latents(pipeline, negative_prompt="")
    for scale in (0.5, 4.0):
        ours = latents(pipeline, negative_prompt="", negative_scale=scale)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents(pipeline, negative_scale=4.0), latents(pipeline, negative_scale=0.5), atol=1e-3)


def test_a_step_is_linear_in_the_negative_scale(sd1):
    """One step of euler is linear in its prediction."""
    at = [latents(sd1, sample_steps=1, sampler="euler", negative_scale=scale) for scale in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(at[2] - at[0], 3 * (at[1] - at[0]), rtol=1e-3, atol=1e-3)


def test_guidance_is_chosen_by_the_scales(sd1):
    assert type(sd1.guidance(QUICK)) is ClassifierFree
    assert type(sd1.guidance(dataclasses.replace(QUICK, negative_scale=2.0))) is NegativeScale
    assert sd1.guidance(dataclasses.replace(QUICK, scale=1.0, negative_scale=2.0)).roles == ("positive",)


class Watch(StepHook):
    """Keeps the first call of the model."""

    call: ModelCall | None = None

    def around(self, run: Any, call: ModelCall) -> Tensor:
        self.call = self.call or call
        return run(call)


def test_sizes_of_xl_are_those_of_the_role(sdxl):
    """--original_height, --original_width, --crop_top, --crop_left and the negative original sizes."""
    watch = Watch()
    latents(
        sdxl,
        watch,
        negative_scale=2.0,
        original_size=(512, 384),
        negative_original_size=(100, 200),
        crop=(7, 9),
    )
    assert watch.call is not None and watch.call.roles == ("negative", "positive", "unconditional")
    negative, positive = [100, 200, 7, 9, 64, 64], [512, 384, 7, 9, 64, 64]
    assert watch.call.conditioning["time_ids"].tolist() == [negative, positive, negative]
    pooled = watch.call.conditioning["pool2"]
    texts = [sdxl.encode_prompts([text])["pool2"][0] for text in ("a dog", "a red cat", "")]
    torch.testing.assert_close(pooled, torch.stack(texts))


@pytest.mark.parametrize("original", [None, (512, 384)])
def test_the_negative_prompt_has_the_positive_ones_sizes_if_there_are_no_others(sdxl, original):
    watch = Watch()
    latents(sdxl, watch, original_size=original, crop=(1, 2))
    assert watch.call is not None
    expected = [*(original or (64, 64)), 1, 2, 64, 64]
    assert watch.call.conditioning["time_ids"].tolist() == [expected, expected]
    assert torch.equal(
        latents(sdxl, original_size=original, negative_original_size=original), latents(sdxl, original_size=original)
    )
