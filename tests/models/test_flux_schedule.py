"""The noise schedule has the values that a reference implementation gives, and the denoising loop integrates it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.models.flux.sampling import denoise, draw_noise, guided, schedule, shift_mu

REFERENCE = json.loads(
    (Path(__file__).parent.parent / "reference_data" / "flux_schedules.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("key", REFERENCE["shifted"])
def test_shifted_sigmas_are_the_reference_values(key):
    steps, tokens = map(int, key.split(","))
    expected = torch.tensor(REFERENCE["shifted"][key])
    torch.testing.assert_close(schedule(steps, tokens), expected, atol=3e-7, rtol=0)


def test_the_shift_grows_with_the_image():
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4080, 1.1472917), (4096, 1.15)):
        assert shift_mu(tokens) == pytest.approx(mu, abs=1e-7)


def test_schnell_steps_are_even():
    assert schedule(4, 1024, shift=False).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_euler_steps_reach_the_end_of_a_constant_velocity_exactly():
    start, velocity = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    seen = []

    def constant(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps)
        return velocity

    end = denoise(constant, start, schedule(7, 1000))
    torch.testing.assert_close(end, start - velocity)
    assert torch.stack(seen)[:, 0].tolist() == schedule(7, 1000)[:-1].tolist()
    assert all(timesteps.shape == (2,) and timesteps.dtype == torch.float32 for timesteps in seen)


def test_guidance_one_is_the_conditional_prediction():
    conditional, unconditional = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), unconditional)


def test_noise_depends_on_the_seed_only():
    cpu = torch.device("cpu")
    expected = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise(12, 64, 5, cpu, torch.float32), expected)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert not torch.equal(draw_noise(12, 64, None, cpu, torch.float32), draw_noise(12, 64, None, cpu, torch.float32))
    assert torch.equal(torch.random.get_rng_state(), before)
