"""Lumina's noise schedule and its truncated, renormalised guidance, against float64 formulas and diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import pytest
import torch
from torch import Tensor

from library.models.sampling import ClassifierFree, FlowEuler, Step, TruncatedClassifierFree, denoise
from library.models.schedules import lumina_sigmas


@pytest.mark.parametrize(("steps", "shift"), [(1, 6.0), (2, 6.0), (7, 1.0), (18, 3.0), (36, 6.0), (1000, 6.0)])
def test_sigmas_are_those_of_stable_diffusion_3s_scheduler(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(lumina_sigmas(steps, shift), scheduler.sigmas, atol=3e-7, rtol=0)


def test_sigmas_of_the_usual_settings():
    sigmas = lumina_sigmas(36, 6.0)
    written = [round(sigma, 4) for sigma in sigmas.tolist()]
    assert written[:3] == [1, 0.9952, 0.9901] and written[-3:] == [0.1760, 0.0348, 0]
    assert sum(1 - sigma < 0.25 for sigma in sigmas.tolist()) == 24, "of 36 steps, so many are guided by default"
    assert sigmas.dtype == torch.float32 and len(sigmas) == 37


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_one_step_leads_from_noise_to_the_image(shift):
    assert lumina_sigmas(1, shift).tolist() == [1, 0]


class Velocities:
    """Random predictions for two images, another one at each call; the positive ones are long, then short."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, latents: Tensor, step: Step, roles: Sequence[str]) -> list[Tensor]:
        size = 2.0 if len(self.calls) % 2 else 0.5
        made = {role: torch.randn(latents.shape, generator=self.generator) for role in ("positive", "negative")}
        made["positive"] *= torch.tensor([size, 1 / size]).reshape(-1, 1, 1, 1)
        self.calls.append({role: made[role] for role in roles})
        return [made[role] for role in roles]


def expected(velocities: Velocities, noise: Tensor, sigmas: Sequence[float], *settings: float) -> numpy.ndarray:
    """Euler steps in float64 along the guided velocity, item by item: the formula of Lumina's official code."""
    scale, truncation, renorm = settings
    latents = noise.double().numpy().copy()
    for index, call in enumerate(velocities.calls):
        sigma, following = sigmas[index : index + 2]
        made = {role: prediction.double().numpy() for role, prediction in call.items()}
        for item in range(len(latents)):
            velocity = made["positive"][item]
            if 1 - sigma < truncation:
                towards, velocity = velocity, made["negative"][item] + scale * (velocity - made["negative"][item])
                longest = renorm * math.sqrt((towards**2).sum())
                length = math.sqrt((velocity**2).sum())
                if renorm > 0 and length >= longest:
                    velocity = velocity * longest / length
            latents[item] += (following - sigma) * velocity
    return latents


@pytest.mark.parametrize("renorm", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("truncation", [0.0, 0.25, 0.7, 1.0])
def test_guidance_is_the_formula(truncation, renorm):
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    sigmas, velocities = lumina_sigmas(12, 3.0), Velocities()
    end = denoise(velocities, FlowEuler(sigmas), noise, TruncatedClassifierFree(4.0, truncation, renorm))
    reference = expected(velocities, noise, sigmas.tolist(), 4.0, truncation, renorm)
    numpy.testing.assert_allclose(end.numpy(), reference, rtol=1e-5, atol=1e-5)
    guided = [set(call) == {"positive", "negative"} for call in velocities.calls]
    assert guided == [1 - sigma < truncation for sigma in sigmas[:-1].tolist()], "no prediction more than needed"
    assert sum(guided) == {0.0: 0, 0.25: 6, 0.7: 10, 1.0: 12}[truncation]


def test_without_truncation_and_renormalisation_it_is_classifier_free_guidance():
    step, latents = Step(0, 1, torch.tensor(0.01)), torch.zeros(2, 1, 2, 2)
    plain, truncated = (
        guidance(Velocities(), latents, step) for guidance in (ClassifierFree(2.5), TruncatedClassifierFree(2.5))
    )
    assert torch.equal(plain, truncated)


def test_a_step_exactly_at_the_end_of_guidance_is_not_guided():
    velocities = Velocities()
    TruncatedClassifierFree(2.0, truncation=0.25)(velocities, torch.zeros(2, 1, 1, 1), Step(0, 1, torch.tensor(0.75)))
    assert velocities.calls[0].keys() == {"positive"}


def test_predictions_of_zero_stay_zero():
    def nothing(latents: Tensor, step: Step, roles: Sequence[str]) -> list[Tensor]:
        return [torch.zeros_like(latents) for _ in roles]

    guided = TruncatedClassifierFree(3.0, renorm=1.0)(nothing, torch.ones(1, 2, 2, 2), Step(0, 1, torch.tensor(1.0)))
    assert torch.equal(guided, torch.zeros(1, 2, 2, 2))
