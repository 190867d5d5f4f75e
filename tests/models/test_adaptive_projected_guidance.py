"""Adaptive projected guidance, step by step, equal to diffusers' guider and to the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from library.models.sampling import AdaptiveProjected, Step

STEPS = 6


def predictions(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, 6, 5)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(STEPS)]


def guided(guidance: AdaptiveProjected, seed: int) -> list[torch.Tensor]:
    results = []
    for index, (negative, positive) in enumerate(predictions(seed)):
        step = Step(index, STEPS, torch.tensor(1 - index / STEPS))
        results.append(guidance(lambda *_, pair=(negative, positive): pair, torch.zeros_like(negative), step))
    return results


@pytest.mark.parametrize(("last_plain", "rescale", "rescale_projected"), [(2, 0.0, 0.0), (0, 0.5, 0.7), (9, 0.3, 0.0)])
def test_it_follows_the_formulas(last_plain, rescale, rescale_projected):
    found = guided(AdaptiveProjected(3.5, last_plain, rescale, rescale_projected), 1)
    for item in range(2):
        moving = None
        for index, (negative, positive) in enumerate(predictions(1)):
            u, c = negative[item].double(), positive[item].double()
            moving = c - u if moving is None else c - u - 0.5 * moving
            if index <= last_plain:
                v, amount = u + 3.5 * (c - u), rescale
            else:
                d = moving * min(1.0, 10 / moving.norm().item())
                e = c / c.norm()
                v, amount = u + 10 * (d - (d * e).sum() * e), rescale_projected
            v = amount * v * c.std() / v.std() + (1 - amount) * v
            torch.testing.assert_close(found[index][item].double(), v, rtol=1e-4, atol=1e-4)


def test_it_equals_diffusers():
    from diffusers.guiders import AdaptiveProjectedMixGuidance
    from diffusers.guiders.adaptive_projected_guidance_mix import MomentumBuffer

    guider = AdaptiveProjectedMixGuidance(
        guidance_scale=3.5, adaptive_projected_guidance_scale=10.0, adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=10.0, eta=0.0, adaptive_projected_guidance_start_step=2,
    )  # fmt: skip
    guider.momentum_buffer = MomentumBuffer(-0.5)  # as its first call of prepare_inputs makes it
    found = guided(AdaptiveProjected(3.5, 2), 7)
    for index, (negative, positive) in enumerate(predictions(7)):
        guider.set_state(index, STEPS, torch.tensor(1000.0 - index))
        expected = guider.forward(positive, negative).pred
        torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-4)
