"""Stable Diffusion's noise schedule, noise, targets and loss weights, against closed formulas in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.models.schedules import rescale_to_zero_terminal_snr
from library.randomness import draw_noise, generator
from library.training.objective.ddpm import (
    add_multires_noise,
    add_noise,
    add_noise_offset,
    fixed_timesteps,
    noise_schedule,
    noise_to_signal,
    sample_timesteps,
    snr_weights,
    training_target,
)
from library.training.objective.losses import LossOptions, elementwise_loss, huber_threshold
from library.training.objective.noise_options import NoiseOptions, StableDiffusionNoiseOptions

Options = StableDiffusionNoiseOptions
SHAPE = (4, 16, 24)
EVERY_STEP = torch.arange(1000)


def generators(count: int, purpose: str = "noise", first: int = 0) -> list[torch.Generator]:
    return [generator(7, purpose, 0, item) for item in range(first, first + count)]


def latents(count: int) -> torch.Tensor:
    return draw_noise(SHAPE, generators(count, "latents")) + torch.arange(4.0)[:, None, None]


def exact_alphas_cumprod() -> list[float]:
    """The definition, one step after the other in Python floats."""
    products, product = [], 1.0
    for step in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * step / 999
        product *= 1 - root * root
        products.append(product)
    return products


# ---- schedule ------------------------------------------------------------------------------------------------------


def test_the_schedule_is_scaled_linear():
    exact = exact_alphas_cumprod()
    schedule = noise_schedule()
    assert schedule.alphas_cumprod.tolist() == pytest.approx(exact, rel=1e-12)
    assert schedule.snr.tolist() == pytest.approx([a / (1 - a) for a in exact], rel=1e-9)


def test_the_schedule_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    known = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for zero in (False, True):
        scheduler = DDPMScheduler(**known, rescale_betas_zero_snr=zero)
        torch.testing.assert_close(
            noise_schedule(zero).alphas_cumprod.float(), scheduler.alphas_cumprod, atol=2e-6, rtol=1e-4
        )


def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_weights_finite():
    roots = [math.sqrt(a) for a in exact_alphas_cumprod()]
    expected = [((s - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for s in roots]
    schedule = noise_schedule(zero_terminal_snr=True)
    assert schedule.alphas_cumprod.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert schedule.alphas_cumprod[-1] == 0
    assert torch.equal(schedule.snr, noise_schedule().snr)
    assert schedule.snr.min() > 0.004
    assert noise_to_signal(schedule, EVERY_STEP)[-1] == math.inf


def test_rescaling_keeps_the_first_step():
    plain = noise_schedule().alphas_cumprod
    assert rescale_to_zero_terminal_snr(plain)[0].item() == pytest.approx(plain[0].item(), rel=1e-12)


def test_the_last_step_of_a_rescaled_schedule_has_a_finite_huber_loss():
    options = LossOptions(loss_type="huber", huber_schedule="snr", huber_c=0.1)
    ratio = noise_to_signal(noise_schedule(True), torch.tensor([0, 999]))
    threshold = huber_threshold(options, torch.tensor([0.0, 0.999]), ratio)
    first = math.sqrt((1 - exact_alphas_cumprod()[0]) / exact_alphas_cumprod()[0])
    assert threshold.tolist() == pytest.approx([0.9 / (1 + first) ** 2 + 0.1, 0.1], rel=1e-5)
    assert elementwise_loss(options, torch.ones(2, 1), torch.zeros(2, 1), threshold).isfinite().all()


# ---- timesteps -----------------------------------------------------------------------------------------------------


def test_timesteps_are_uniform_over_all_thousand():
    steps = sample_timesteps(NoiseOptions(), generators(4000, "timestep"))
    assert steps.dtype == torch.int64
    assert 0 <= steps.min() < 5 and 994 < steps.max() <= 999
    counts = steps.bincount(minlength=1000).view(10, 100).sum(1).double()
    # Chi-squared with 9 degrees of freedom, 99.9 % quantile 27.9; the draws are fixed by their seed.
    assert ((counts - 400) ** 2 / 400).sum() < 27.9


def test_an_items_timestep_does_not_depend_on_its_batch():
    together = sample_timesteps(NoiseOptions(), generators(5, "timestep"))
    apart = [sample_timesteps(NoiseOptions(), generators(1, "timestep", item)) for item in range(5)]
    assert torch.equal(together, torch.cat(apart))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_timesteps_stay_within_their_bounds(low, high):
    options = NoiseOptions(min_timestep=low, max_timestep=high)
    if low > high:
        with pytest.raises(UserError, match="min_timestep"):
            sample_timesteps(options, generators(1))
        return
    steps = sample_timesteps(options, generators(20))
    lowest = min(low, 999)
    assert lowest <= steps.min() and steps.max() <= max(lowest, high - 1)


def test_equal_bounds_fix_the_timestep():
    assert sample_timesteps(NoiseOptions(min_timestep=300, max_timestep=300), generators(3)).tolist() == [300] * 3
    assert sample_timesteps(NoiseOptions(min_timestep=998, max_timestep=999), generators(3)).tolist() == [998] * 3
    assert fixed_timesteps(1000, 2).tolist() == [999, 999]


# ---- noise ---------------------------------------------------------------------------------------------------------


def test_noise_offset_moves_whole_channels():
    noise = torch.zeros(300, *SHAPE)
    moved = add_noise_offset(Options(noise_offset=0.1), noise, latents(300), generators(300))
    assert torch.equal(moved, moved[..., :1, :1].expand_as(moved))
    assert moved.std().item() == pytest.approx(0.1, rel=0.06)
    assert moved.mean().item() == pytest.approx(0.0, abs=0.01)
    assert add_noise_offset(Options(), noise, latents(300), generators(300)) is noise


def test_random_strength_spreads_the_offset_of_each_item():
    options = Options(noise_offset=0.2, noise_offset_random_strength=True)
    drawn = add_noise_offset(options, torch.zeros(400, *SHAPE), latents(400), generators(400))[..., 0, 0]
    # E[(u o n)^2] = o^2 / 3
    assert drawn.pow(2).mean().item() == pytest.approx(0.2**2 / 3, rel=0.12)
    fixed = add_noise_offset(Options(noise_offset=0.2), torch.zeros(400, *SHAPE), latents(400), generators(400))
    assert drawn.abs().max() < fixed.abs().max()


@pytest.mark.parametrize("scale", [0.3, -0.1])
def test_adaptive_offset_follows_the_channel_means_and_is_never_negative(scale):
    options, clean = Options(noise_offset=0.1, adaptive_noise_scale=scale), latents(5)
    noise = torch.zeros(5, *SHAPE)
    plain = add_noise_offset(Options(noise_offset=0.1), noise, clean, generators(5)).double() / 0.1
    strength = (0.1 + scale * clean.double().mean((2, 3), keepdim=True).abs()).clamp(min=0)
    adapted = add_noise_offset(options, noise, clean, generators(5)).double()
    torch.testing.assert_close(adapted, plain * strength, atol=1e-6, rtol=1e-4)
    assert (strength == 0).any() == (scale < 0)


def exact_layers(generator: torch.Generator, count: int, discount: float) -> torch.Tensor:
    """The same draws, put together by the written rule in float64 (bilinear weights spelled out)."""
    channels, height, width = SHAPE
    total = torch.zeros(SHAPE, dtype=torch.float64)
    ratios = random.Random(generator.initial_seed())
    for index in range(count):
        ratio = 2 + 2 * ratios.random()
        rows, columns = max(1, math.floor(height / ratio**index)), max(1, math.floor(width / ratio**index))
        layer = torch.randn(1, channels, rows, columns, generator=generator)[0].double()
        total += discount**index * torch.einsum("yr,crk,xk->cyx", weights(height, rows), layer, weights(width, columns))
        if 1 in (rows, columns):
            break
    return total


def weights(large: int, small: int) -> torch.Tensor:
    """[large, small]: linear interpolation between pixel centres, constant beyond the outer ones."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for place in range(large):
        centre = min(max((place + 0.5) * small / large - 0.5, 0), small - 1)
        below = math.floor(centre)
        matrix[place, below] += 1 - (centre - below)
        matrix[place, min(below + 1, small - 1)] += centre - below
    return matrix


@pytest.mark.parametrize(("count", "discount"), [(1, 0.3), (2, 0.8), (10, 0.5)])
def test_multires_noise_is_the_sum_of_ever_coarser_layers(count, discount):
    options = Options(multires_noise_iterations=count, multires_noise_discount=discount)
    noise = draw_noise(SHAPE, generators(3))
    drawn = add_multires_noise(options, noise, generators(3, "multires"))
    for item, plain, source in zip(drawn, noise, generators(3, "multires")):
        total = plain.double() + exact_layers(source, count, discount)
        torch.testing.assert_close(item.double(), total / total.std(), atol=1e-5, rtol=1e-4)


def test_multires_noise_of_an_item_does_not_depend_on_its_batch():
    options = Options(noise_offset=0.1, multires_noise_iterations=6, multires_noise_discount=0.4)

    def drawn(count: int, first: int) -> torch.Tensor:
        clean = latents(4)[first : first + count]
        noise = add_noise_offset(options, draw_noise(SHAPE, generators(count, "n", first)), clean, generators(count))
        return add_multires_noise(options, noise, generators(count, "m", first))

    torch.testing.assert_close(drawn(4, 0)[:1], drawn(1, 0), atol=1e-6, rtol=1e-6)
    assert drawn(4, 0).std(dim=(1, 2, 3)).tolist() == pytest.approx([1] * 4, rel=1e-5)
    plain = draw_noise(SHAPE, generators(2))
    assert add_multires_noise(Options(), plain, generators(2)) is plain


def test_coarse_layers_are_seen_in_the_noise():
    # A block of 4 x 4 white noise has a mean of variance 1/16; what is left of the coarse layers adds to it.
    options = Options(multires_noise_iterations=6, multires_noise_discount=0.9)
    noise = add_multires_noise(options, draw_noise((4, 32, 32), generators(20)), generators(20, "m"))
    blocks = torch.nn.functional.avg_pool2d(noise, 4)
    assert blocks.var() > 3 / 16


# ---- noisy input and target ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
def test_noisy_latents_and_targets_follow_their_formulas(zero):
    schedule, steps = noise_schedule(zero), torch.tensor([0, 17, 500, 999])
    clean, noise, extra = latents(4), draw_noise(SHAPE, generators(4)), draw_noise(SHAPE, generators(4, "extra"))
    a = torch.tensor([schedule.alphas_cumprod[step] for step in steps], dtype=torch.float64)[:, None, None, None]
    x, n, e = clean.double(), noise.double(), extra.double()
    close = {"atol": 2e-6, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(add_noise(schedule, clean, noise, steps), a.sqrt() * x + (1 - a).sqrt() * n, **close)
    torch.testing.assert_close(
        add_noise(schedule, clean, noise, steps, extra), a.sqrt() * x + (1 - a).sqrt() * (n + e), **close
    )
    velocity = training_target(schedule, clean, noise, steps, v_parameterization=True)
    torch.testing.assert_close(velocity, a.sqrt() * n - (1 - a).sqrt() * x, **close)
    assert training_target(schedule, clean, noise, steps) is noise
    assert add_noise(schedule, clean, noise, steps).dtype == velocity.dtype == torch.float32


def test_noise_and_velocity_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    steps, clean, noise = torch.tensor([3, 200, 640, 998]), latents(4), draw_noise(SHAPE, generators(4))
    schedule = noise_schedule()
    torch.testing.assert_close(
        add_noise(schedule, clean, noise, steps), scheduler.add_noise(clean, noise, steps), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        training_target(schedule, clean, noise, steps, True),
        scheduler.get_velocity(clean, noise, steps),
        atol=1e-5,
        rtol=1e-5,
    )


def test_noise_to_signal_is_the_inverse_root_of_the_snr():
    schedule = noise_schedule()
    torch.testing.assert_close(noise_to_signal(schedule, EVERY_STEP).double() ** -2, schedule.snr, rtol=1e-5, atol=0)


# ---- loss weights --------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([None, 1.0, 5.0, 2000.0]),
    st.booleans(),
    st.sampled_from([None, 0.5, 1.0]),
    st.booleans(),
)
def test_weights_are_the_options_applied_one_after_the_other(step, v, gamma, scaled, v_like, debiased):
    a = exact_alphas_cumprod()[step]
    snr = a / (1 - a)
    loss, capped = 1.0, min(snr, 1000.0)
    if gamma:
        loss *= min(snr, gamma) / (snr + 1 if v else snr)
    if scaled:
        loss *= capped / (capped + 1)
    if v_like:
        loss = loss + v_like * loss * (capped + 1) / capped
    if debiased:
        loss *= 1 / (capped + 1) if v else 1 / math.sqrt(capped)
    options = Options(
        min_snr_gamma=gamma,
        scale_v_pred_loss_like_noise_pred=scaled,
        v_pred_like_loss=v_like,
        debiased_estimation_loss=debiased,
    )
    weight = snr_weights(options, noise_schedule().snr[torch.tensor([step])], v)
    assert weight.item() == pytest.approx(loss, rel=1e-9)


def test_weights_are_finite_at_every_step_of_every_schedule():
    for zero in (False, True):
        snr = noise_schedule(zero).snr
        for v in (False, True):
            options = Options(min_snr_gamma=5.0, debiased_estimation_loss=True, v_pred_like_loss=1.0)
            assert snr_weights(options, snr, v).isfinite().all()
            assert torch.equal(snr_weights(Options(), snr, v), torch.ones(1000, dtype=torch.float64))


def test_min_snr_is_that_of_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, EVERY_STEP)
    for v in (False, True):
        known = snr.clamp(max=5.0) / (snr + 1 if v else snr)  # as in the diffusers training scripts
        ours = snr_weights(Options(min_snr_gamma=5.0), noise_schedule().snr, v)
        torch.testing.assert_close(ours.float(), known, rtol=2e-3, atol=1e-6)
