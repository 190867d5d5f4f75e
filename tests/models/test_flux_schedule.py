"""The noise schedule has the values that a reference implementation gives, and the denoising loop integrates it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.models.sampling import ClassifierFree, FlowEuler, Step, denoise
from library.models.schedules import flow_sigmas, flux_shift
from library.randomness import draw_noise, seeded_generator

REFERENCE = json.loads(
    (Path(__file__).parent.parent / "reference_data" / "flux_schedules.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("key", REFERENCE["shifted"])
def test_shifted_sigmas_are_the_reference_values(key):
    steps, tokens = map(int, key.split(","))
    expected = torch.tensor(REFERENCE["shifted"][key])
    torch.testing.assert_close(flow_sigmas(steps, flux_shift(tokens)), expected, atol=3e-7, rtol=0)


def test_steps_are_even_without_a_shift():
    assert flow_sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_euler_steps_reach_the_end_of_a_constant_velocity_exactly():
    start, velocity = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    seen = []

    def constant(latents: torch.Tensor, step: Step, roles: object) -> list[torch.Tensor]:
        seen.append(step.timestep)
        return [velocity]

    sigmas = flow_sigmas(7, 2.5)
    torch.testing.assert_close(denoise(constant, FlowEuler(sigmas), start), start - velocity)
    assert torch.stack(seen).tolist() == sigmas[:-1].tolist()
    assert all(timestep.shape == () and timestep.dtype == torch.float32 for timestep in seen)


def test_guidance_one_is_the_conditional_prediction():
    conditional, unconditional = torch.randn(3), torch.randn(3)
    step, latents = Step(0, 1, torch.tensor(1.0)), torch.zeros(3)

    def predict(latents: torch.Tensor, step: Step, roles: object) -> list[torch.Tensor]:
        return [{"positive": conditional, "negative": unconditional}[role] for role in roles]

    torch.testing.assert_close(ClassifierFree(1.0)(predict, latents, step), conditional)
    torch.testing.assert_close(ClassifierFree(0.0)(predict, latents, step), unconditional)


def test_noise_depends_on_the_seed_only():
    expected = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise((12, 64), [seeded_generator(5)]), expected)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, other = draw_noise((12, 64), [seeded_generator(None), seeded_generator(None)])
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
