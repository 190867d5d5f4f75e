"""Samplers: every name finds the image of a model that knows it, along the schedule of training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.models.sampling import DiffusersSolver, Role, Step, denoise
from library.models.stable_diffusion.sampling import (
    SAMPLERS,
    SCHEDULERS,
    make_scheduler,
    require_sampler,
    zero_terminal_betas,
)
from library.randomness import draw_noise, seeded_generator

NAMES = "ddim pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle".split()
SYNONYMS = "k_lms k_euler k_euler_a k_dpm_2 k_dpm_2_a".split()


def alphas(zero_terminal_snr: bool = False) -> np.ndarray:
    """The cumulative product of the schedule by its formula, in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    cumulative = np.cumprod(1 - betas)
    if zero_terminal_snr:
        roots = np.sqrt(cumulative)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        cumulative = roots**2
    return cumulative


class KnowsTheImage:
    """A model whose data is one image: the noise, or v, that leads there from any latents."""

    def __init__(self, image: torch.Tensor, v_prediction: bool, zero_terminal_snr: bool):
        cumulative = np.maximum(alphas(zero_terminal_snr), 2**-24)
        self.sigmas = np.sqrt((1 - cumulative) / cumulative)
        self.image, self.v_prediction = image, v_prediction
        self.timesteps: list[float] = []

    def __call__(self, latents: torch.Tensor, step: Step, roles: Sequence[Role]) -> list[torch.Tensor]:
        timestep = step.timestep
        self.timesteps.append(float(timestep))
        # Between whole timesteps, most samplers interpolate sigma, some its logarithm: nearly the same.
        sigma = float(np.interp(float(timestep), np.arange(1000), self.sigmas))
        alpha = 1 / (1 + sigma**2)
        noise = (latents - alpha**0.5 * self.image) / (1 - alpha) ** 0.5
        return [alpha**0.5 * noise - (1 - alpha) ** 0.5 * self.image if self.v_prediction else noise]


def draw(sampler: str, model: KnowsTheImage, steps: int = 12, **arguments: bool) -> torch.Tensor:
    generator = seeded_generator(3)
    scheduler = make_scheduler(sampler, v_prediction=model.v_prediction, **arguments)
    noise = draw_noise((4, 6, 5), [generator])
    return denoise(model, DiffusersSolver(scheduler, steps), noise, generators=[generator])


@pytest.mark.parametrize(
    "v_prediction, zero_terminal_snr",
    [(False, False), pytest.param(True, False, marks=pytest.mark.thorough), (True, True)],
)
@pytest.mark.parametrize("sampler", NAMES)
def test_every_sampler_finds_the_image(sampler, v_prediction, zero_terminal_snr):
    image = torch.rand(1, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    model = KnowsTheImage(image, v_prediction, zero_terminal_snr)
    found = draw(sampler, model, zero_terminal_snr=zero_terminal_snr)
    assert found.dtype == torch.float32
    assert (found - image).abs().max() < 0.15
    assert model.timesteps[0] <= 999 and model.timesteps[-1] < 100


def test_the_names_are_those_of_the_options():
    assert set(SAMPLERS) == {*NAMES, *SYNONYMS} and set(SCHEDULERS) == set(NAMES)
    for name in SYNONYMS:
        assert type(make_scheduler(name)) is type(make_scheduler(name.removeprefix("k_")))


@pytest.mark.parametrize("sampler", NAMES)
def test_the_schedule_is_that_of_training(sampler):
    torch.testing.assert_close(
        make_scheduler(sampler).alphas_cumprod.double(), torch.tensor(alphas()), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("sampler", NAMES)
def test_zero_terminal_snr_is_sampled_from_pure_noise_on(sampler):
    scheduler = make_scheduler(sampler, v_prediction=True, zero_terminal_snr=True)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), torch.tensor(alphas(True)), rtol=1e-3, atol=1e-6)
    assert scheduler.alphas_cumprod[-1] < 1e-7
    model = KnowsTheImage(torch.zeros(1, 4, 6, 5), True, True)
    draw(sampler, model, zero_terminal_snr=True)
    assert model.timesteps[0] == 999


def test_zero_terminal_betas_end_at_a_signal_that_divides():
    cumulative = np.cumprod(1 - np.array(zero_terminal_betas()))
    np.testing.assert_allclose(cumulative[:-1], alphas(True)[:-1], rtol=1e-3)
    assert cumulative[-1] == pytest.approx(2**-24)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sampler", NAMES)
def test_few_steps_are_enough(sampler, steps):
    model = KnowsTheImage(torch.zeros(1, 4, 6, 5), False, False)
    assert draw(sampler, model, steps).isfinite().all()


def test_latents_are_kept_within_bounds_only_where_asked():
    image = torch.full((1, 4, 6, 5), 3.0)
    for sampler in ("ddim", "heun"):
        assert draw(sampler, KnowsTheImage(image, False, False)).max() > 2.5  # latents go beyond 1
        assert draw(sampler, KnowsTheImage(image, False, False), clip_sample=True).max() <= 1


@pytest.mark.parametrize("sampler", ["euler_a", "dpm_2_a"])
def test_noise_within_a_run_comes_from_the_images_own_generator(sampler):
    model = KnowsTheImage(torch.zeros(1, 4, 6, 5), False, False)
    noise = draw_noise((4, 6, 5), [seeded_generator(1)])

    def run(seed: int) -> torch.Tensor:
        scheduler = make_scheduler(sampler)
        kept: list[torch.Tensor] = []

        def predict(latents: torch.Tensor, step: Step, roles: Sequence[Role]) -> list[torch.Tensor]:
            kept.append(latents)
            return model(latents, step, roles)

        denoise(predict, DiffusersSolver(scheduler, 4), noise, generators=[seeded_generator(seed)])
        return torch.cat(kept)

    torch.manual_seed(1)
    first, state = run(5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, run(5)) and not torch.equal(first, run(6))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_a_seed_gives_the_noise_that_torch_gives():
    expected = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise((4, 6, 5), [seeded_generator(7)]), expected)
    one, other = draw_noise((4, 6, 5), [seeded_generator(None), seeded_generator(None)])
    assert not torch.equal(one, other)


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r'prompts\.txt, line 3: "eular" is not a sampler.* dpmsolver\+\+.*"euler"'):
        require_sampler("eular", "prompts.txt, line 3")
    with pytest.raises(UserError, match="--sample_sampler"):
        make_scheduler("DDIM")


def test_checking_a_samplers_name_loads_no_torch():
    code = "import sys, library.models.stable_diffusion.sampling as s; s.require_sampler('ddim'); print(*sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    loaded = run.stdout.split()
    assert "library.errors" in loaded and not {"torch", "diffusers", "numpy"} & set(loaded)
