"""The denoising loop: batches, generators, hooks, start latents, and guidance that keeps a state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from library.models.flux.pipeline import FluxFiles, FluxPipeline, FluxRequest
from library.models.pipeline import to_image
from library.models.sampling import (
    DiffusersSolver,
    FlowEuler,
    Guidance,
    ModelCall,
    Predict,
    RunModel,
    Step,
    StepHook,
    denoise,
)
from library.models.schedules import flow_sigmas
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)
from library.models.stable_diffusion.sampling import make_scheduler
from library.randomness import draw_noise, seeded_generator

SIZE = {"width": 64, "height": 64, "sample_steps": 3}


@pytest.fixture(scope="module")
def flux(tiny_flux) -> FluxPipeline:
    return FluxPipeline(FluxFiles(**vars(tiny_flux)), torch.float32, "cpu", t5xxl_max_token_length=16)


@pytest.fixture(scope="module")
def sd1(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_of_a_flux_batch_are_those_drawn_alone(flux, scale):
    requests = [FluxRequest(text, "dog", seed=seed, scale=scale, **SIZE) for text, seed in (("a cat", 1), ("b", 2))]
    alone = torch.cat([flux.generate_latents(request) for request in requests])
    torch.testing.assert_close(flux.generate_latents(*requests), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler_a", "dpmsolver++"])
def test_images_of_a_stable_diffusion_batch_are_those_drawn_alone(sd1, sampler):
    """Samplers that add noise draw each image's from its own generator; others: beside what diffusers draws."""
    texts = (("a cat", 1), ("b", 2))
    requests = [StableDiffusionRequest(text, seed=seed, sampler=sampler, **SIZE) for text, seed in texts]
    alone = torch.cat([sd1.generate_latents(request) for request in requests])
    torch.testing.assert_close(sd1.generate_latents(*requests), alone, rtol=1e-3, atol=1e-3)


def zero(latents: Tensor, step: Step, roles: object) -> list[Tensor]:
    return [torch.zeros_like(latents)]


def test_hooks_see_and_change_the_latents_around_every_step():
    seen: list[tuple[str, int, float]] = []

    class Add(StepHook):
        def before(self, latents: Tensor, step: Step) -> Tensor:
            seen.append(("before", step.index, float(latents)))
            return latents + 1

        def after(self, latents: Tensor, step: Step) -> Tensor:
            seen.append(("after", step.index, float(latents)))
            return latents + 10

    end = denoise(zero, FlowEuler(flow_sigmas(2)), torch.zeros(1, 1), hooks=[Add()])
    assert end.item() == 22
    assert seen == [("before", 0, 0), ("after", 0, 1), ("before", 1, 11), ("after", 1, 12)]


def test_guidance_knows_the_step_and_may_keep_what_it_saw():
    class Momentum(Guidance):
        roles = ("negative", "positive")

        def __init__(self) -> None:
            self.sum: Tensor | float = 0.0
            self.steps: list[tuple[int, int]] = []

        def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
            self.steps.append((step.index, step.count))
            if step.index == 0:  # truncated: one prediction is enough
                return predict(latents, step, ["positive"])[0]
            negative, positive = predict(latents, step, self.roles)
            self.sum = self.sum + positive - negative
            return positive + self.sum

    def predict(latents: Tensor, step: Step, roles: object) -> list[Tensor]:
        return [torch.full_like(latents, {"positive": 2.0, "negative": 1.0}[role]) for role in roles]

    guidance = Momentum()
    end = denoise(predict, FlowEuler(flow_sigmas(4)), torch.zeros(1, 1), guidance)
    assert guidance.steps == [(index, 4) for index in range(4)]
    assert end.item() == pytest.approx(-(2 + 3 + 4 + 5) / 4)


def test_flow_matching_begins_with_an_image_under_the_noise_of_a_step():
    image, noise = torch.randn(1, 4), torch.randn(1, 4)
    solver = FlowEuler(flow_sigmas(4))

    def velocity(latents: Tensor, step: Step, roles: object) -> list[Tensor]:
        return [noise - image]

    torch.testing.assert_close(solver.start(noise, image, 3), 0.75 * image + 0.25 * noise)
    torch.testing.assert_close(denoise(velocity, solver, noise, image=image, first=1), image)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_samplers_begin_with_an_image_under_the_noise_of_a_step(sampler):
    image = torch.rand(1, 4, 6, 5) * 2 - 1
    noise = draw_noise((4, 6, 5), [seeded_generator(1)])

    def knows(latents: Tensor, step: Step, roles: object) -> list[Tensor]:
        return [noise]

    solver = DiffusersSolver(make_scheduler(sampler), 8)
    end = denoise(knows, solver, noise, image=image, first=4)
    torch.testing.assert_close(end, image, rtol=0.02, atol=0.08)


def test_start_latents_of_a_request_are_drawn_over(flux):
    request = FluxRequest("a cat", seed=1, **SIZE)
    start = flux.generate_latents(FluxRequest("a dog", seed=2, **SIZE))[0]
    over = [flux.generate_latents(replace(request, start_latents=start, first_step=step)) for step in (0, 2)]
    distances = [(latents - start).norm().item() for latents in over]
    assert distances[1] < distances[0]


def test_pixels_are_rounded_to_the_nearest_level():
    levels = torch.tensor([-1, 1 / 127.5 * 0.6 - 1, 1 / 127.5 * 0.4 - 1, 1]).expand(3, 1, 4)
    assert numpy.array(to_image(levels))[0, :, 0].tolist() == [0, 1, 0, 255]


def test_every_text_is_encoded_once_for_each_role(flux):
    calls = []
    encode = flux.encode_prompts

    def counted(prompts: list[str], encoders: object = None, role: str = "positive") -> dict[str, Tensor]:
        calls.append((*prompts, role))
        return encode(prompts, encoders, role)

    texts = [("a cat", "positive"), ("", "negative"), ("a cat", "positive"), ("", "positive")]
    flux.encode_prompts = counted
    try:
        made = flux.encode_texts(texts)
    finally:
        del flux.encode_prompts
    assert sorted(calls) == sorted(set(texts)) and made.keys() == set(texts)
    for (text, role), conditioning in made.items():
        alone = encode([text], role=role)
        assert all(torch.equal(conditioning[name], values) for name, values in alone.items())
    for key, conditioning in flux.encode_texts(texts, batch_size=3).items():
        for name, values in conditioning.items():
            torch.testing.assert_close(values, made[key][name], rtol=1e-5, atol=1e-5)


def test_features_wrap_the_model_the_guidance_and_the_solver(sd1):
    """Each of two hooks sees every call of the model, with its rows and its step; the last one is the outermost."""
    order: list[tuple[str, int]] = []

    class Feature(StepHook):
        def __init__(self, name: str):
            self.name = name

        @contextmanager
        def attached(self, denoiser: Any) -> Iterator[None]:
            assert denoiser is sd1.load("unet")
            order.append((f"{self.name} enters", 0))
            yield
            order.append((f"{self.name} leaves", 0))

        def around(self, run: RunModel, call: ModelCall) -> Tensor:
            assert call.roles == ("negative", "positive") and call.images == 2
            assert len(call.latents) == len(call.timesteps) == len(call.conditioning["hidden_state"]) == 4
            order.append((self.name, call.step.index))
            return run(call)

    size = {**SIZE, "sample_steps": 2}
    requests = [StableDiffusionRequest("a", seed=seed, sampler="euler", **size) for seed in (1, 2)]
    plain = sd1.generate_latents(*requests)
    assert torch.equal(sd1.generate_latents(*requests, hooks=[Feature("inner"), Feature("outer")]), plain)
    calls = [(name, index) for index in (0, 1) for name in ("outer", "inner")]
    inside = [("inner enters", 0), ("outer enters", 0), *calls, ("outer leaves", 0), ("inner leaves", 0)]
    assert order == inside
