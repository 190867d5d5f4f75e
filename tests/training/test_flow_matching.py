"""Noise levels, noise and targets of flow matching, against closed formulas in float64 and known numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_train_network import FluxFlowOptions
from library.errors import UserError
from library.models.schedules import flux_shift, shift_sigmas
from library.randomness import draw_noise, generator
from library.training.objective.flow_matching import (
    FlowMatchingOptions,
    add_noise,
    apply_prediction_type,
    noise_to_signal,
    objective_notice,
    sample_sigmas,
    sigma_table,
    sigma_weights,
    training_target,
    unused_flow_options,
)
from library.training.objective.noise import draw_input_perturbation, per_item
from library.training.objective.noise_options import NoiseOptions, check_noise_options

SAMPLINGS = ["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"]


def generators(count: int, purpose: str = "sigma", first: int = 0) -> list[torch.Generator]:
    return [generator(7, purpose, 0, item) for item in range(first, first + count)]


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def assert_follows(values: torch.Tensor, cdf) -> None:
    """Kolmogorov-Smirnov at the 1 % level; the draws are fixed by their seed, so this never flickers."""
    values = values.double().sort().values
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    expected = cdf(values)
    distance = torch.maximum((expected - steps).abs(), (expected - steps + 1 / len(values)).abs()).max()
    assert distance < 1.63 / math.sqrt(len(values))


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4080, 1.1472917), (4096, 1.15)])
def test_flux_shift_is_the_exponential_of_the_published_line(tokens, mu):
    assert math.log(flux_shift(tokens)) == pytest.approx(mu, abs=1e-7)


def test_recommended_shift_is_flux_shift_at_1024_pixels():
    assert flux_shift(64 * 64) == pytest.approx(3.1582, abs=5e-5)


@pytest.mark.parametrize(
    ("steps", "tokens", "expected"),
    [
        (4, 1024, [1, 0.849235, 0.652489, 0.384945, 0]),
        (4, 4096, [1, 0.904531, 0.759511, 0.512844, 0]),
    ],
)
def test_shift_gives_the_known_sampling_schedule(steps, tokens, expected):
    schedule = shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), flux_shift(tokens))
    torch.testing.assert_close(schedule, torch.tensor(expected, dtype=torch.float64), atol=5e-7, rtol=0)


def test_table_holds_the_known_numbers_and_no_zero():
    table = sigma_table()
    assert table.dtype == torch.float32
    for index, value in {0: 1, 1: 0.9996664, 500: 0.75, 998: 0.0059761, 999: 0.0029940}.items():
        assert table[index].item() == pytest.approx(value, abs=1e-7)
    assert (table.diff() < 0).all()
    assert table.min() > 0


def test_table_equals_the_flow_match_scheduler_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    torch.testing.assert_close(sigma_table(3.0), scheduler.sigmas[:1000], atol=2e-7, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_items_noise_level_does_not_depend_on_its_batch(sampling):
    options = FlowMatchingOptions(timestep_sampling=sampling)
    together = sample_sigmas(options, generators(6), 1024)
    apart = torch.cat([sample_sigmas(options, generators(1, first=item), 1024) for item in range(6)])
    assert torch.equal(together, apart)
    assert together.dtype == torch.float32
    assert len(set(together.tolist())) > 3


def test_uniform_and_sigmoid_follow_their_distributions():
    many = 3000
    assert_follows(
        sample_sigmas(FlowMatchingOptions(timestep_sampling="uniform"), generators(many), 1), lambda s: s.clone()
    )
    for scale in (1.0, 1.7):
        options = FlowMatchingOptions(timestep_sampling="sigmoid", sigmoid_scale=scale)
        assert_follows(
            sample_sigmas(options, generators(many), 1), lambda s, scale=scale: normal_cdf(torch.logit(s) / scale)
        )


def test_shifted_samplings_follow_the_shifted_logit_normal():
    # logit(S s / (1 + (S - 1) s)) = logit(s) + ln S
    options = FlowMatchingOptions(timestep_sampling="shift", discrete_flow_shift=3.1582, sigmoid_scale=0.8)
    assert_follows(
        sample_sigmas(options, generators(3000), 1), lambda s: normal_cdf((torch.logit(s) - math.log(3.1582)) / 0.8)
    )
    options = FlowMatchingOptions(timestep_sampling="flux_shift")
    mu = 0.5 + 0.65 * (2304 - 256) / 3840
    assert_follows(sample_sigmas(options, generators(3000), 2304), lambda s: normal_cdf(torch.logit(s) - mu))


def table_cdf(density_cdf, sigmas: torch.Tensor) -> torch.Tensor:
    """P(table[floor(1000 u)] <= s): the table falls, so that it is P(u >= position of s)."""
    unshifted = sigmas / (3 - 2 * sigmas)
    return 1 - density_cdf((1 - unshifted).clamp(0, 1))


@pytest.mark.parametrize("scheme", ["uniform", "none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
def test_table_sampling_has_the_density_of_the_weighting_scheme(scheme):
    options = FlowMatchingOptions(weighting_scheme=scheme, logit_mean=0.3, logit_std=0.7, mode_scale=1.29)
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    if scheme == "logit_normal":
        sorted_u = None
        cdf = lambda u: normal_cdf((torch.logit(u) - 0.3) / 0.7)  # noqa: E731
    elif scheme == "mode":
        sorted_u = (1 - grid - 1.29 * (torch.cos(math.pi * grid / 2) ** 2 - 1 + grid)).sort().values
        cdf = lambda u: torch.searchsorted(sorted_u, u.contiguous()).double() / len(grid)  # noqa: E731
    else:
        cdf = lambda u: u  # noqa: E731
    assert_follows(sample_sigmas(options, generators(3000), 1), lambda s: table_cdf(cdf, s))


def test_table_sampling_gives_only_values_of_the_table_whatever_the_flow_shift():
    first = sample_sigmas(FlowMatchingOptions(discrete_flow_shift=3.0), generators(200), 1)
    second = sample_sigmas(FlowMatchingOptions(discrete_flow_shift=1.0), generators(200), 1)
    assert torch.isin(first, sigma_table()).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63)])
def test_nextdit_shift_draws_uniformly_and_shifts_by_the_published_line(tokens, mu):
    drawn = sample_sigmas(FlowMatchingOptions(timestep_sampling="nextdit_shift"), generators(3000), tokens)
    assert_follows(drawn, lambda s: s / (math.exp(mu) * (1 - s) + s))  # sigma = e^mu / (e^mu + 1 / y - 1), for y


def test_extreme_mode_draws_stay_inside_the_table():
    options = FlowMatchingOptions(weighting_scheme="mode", mode_scale=5.0)
    sigmas = sample_sigmas(options, generators(500), 1)
    assert torch.isin(sigmas, sigma_table()).all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_timestep_bounds_hold_in_every_sampling(sampling):
    options = FlowMatchingOptions(timestep_sampling=sampling)
    free = sample_sigmas(options, generators(300), 1024)
    bounded = sample_sigmas(options, generators(300), 1024, NoiseOptions(min_timestep=200, max_timestep=700))
    assert bounded.min() >= 0.2
    assert bounded.max() <= 0.7
    torch.testing.assert_close(bounded, 0.2 + 0.5 * free)
    fixed = sample_sigmas(options, generators(3), 1024, NoiseOptions(min_timestep=400, max_timestep=400))
    assert torch.equal(fixed, torch.full((3,), 0.4))


@pytest.mark.parametrize(("low", "high"), [(-1, 10), (500, 400), (0, 1001)])
def test_impossible_timestep_bounds_are_refused(low, high):
    with pytest.raises(UserError, match="min_timestep"):
        check_noise_options(NoiseOptions(min_timestep=low, max_timestep=high))


def test_noise_is_standard_normal_and_an_items_own():
    noise = draw_noise((16, 24, 32), generators(4, "noise"))
    assert noise.shape == (4, 16, 24, 32)
    assert_follows(noise.flatten()[:20000], normal_cdf)
    assert torch.equal(noise[2:3], draw_noise((16, 24, 32), generators(1, "noise", first=2)))


def test_input_perturbation_has_the_asked_strength():
    shape = (16, 32, 32)
    assert draw_input_perturbation(NoiseOptions(), shape, generators(2)) is None
    fixed = draw_input_perturbation(NoiseOptions(ip_noise_gamma=0.1), shape, generators(3))
    assert fixed is not None
    torch.testing.assert_close(fixed.flatten(1).std(1), torch.full((3,), 0.1), rtol=0.03, atol=0)
    options = NoiseOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    drawn = draw_input_perturbation(options, shape, generators(300))
    assert drawn is not None
    assert_follows(drawn.flatten(1).std(1) / 0.1, lambda s: s.clamp(0, 1))


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_noisy_latents_lie_on_the_line_between_latents_and_noise(sigma, seed):
    made = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 1, 4, 6, 5, generator=made)
    noisy = add_noise(latents, noise, torch.tensor([sigma], dtype=torch.float32))
    expected = (1 - sigma) * latents.double() + sigma * noise.double()
    torch.testing.assert_close(noisy.double(), expected, atol=2e-6, rtol=1e-6)
    assert noisy.dtype == torch.float32


def test_perturbation_enters_the_input_but_not_the_target():
    latents, noise, perturbation = torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.3, 0.9])
    noisy = add_noise(latents, noise, sigmas, perturbation)
    s = sigmas[:, None, None, None]
    torch.testing.assert_close(noisy, (1 - s) * latents + s * (noise + perturbation))
    target = training_target(FlowMatchingOptions(model_prediction_type="raw"), latents, noise, noisy, sigmas)
    torch.testing.assert_close(target, noise - latents)


@pytest.fixture
def case():
    made = torch.Generator().manual_seed(3)
    latents, noise, velocity = torch.randn(3, 2, 16, 8, 8, generator=made)
    sigmas = torch.tensor([0.25, 0.8])
    return latents, noise, velocity, sigmas, add_noise(latents, noise, sigmas)


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_a_perfect_velocity_has_no_loss_in_any_prediction_type(case, kind):
    latents, noise, _, sigmas, noisy = case
    options = FlowMatchingOptions(model_prediction_type=kind)
    prediction = apply_prediction_type(options, noise - latents, noisy, sigmas)
    assert torch.equal(prediction, training_target(options, latents, noise, noisy, sigmas))


def test_prediction_types_compare_what_they_say(case):
    latents, noise, velocity, sigmas, noisy = case
    s = sigmas[:, None, None, None]
    raw, additive, scaled = (
        FlowMatchingOptions(model_prediction_type=kind) for kind in ("raw", "additive", "sigma_scaled")
    )
    torch.testing.assert_close(apply_prediction_type(raw, velocity, noisy, sigmas), velocity)
    torch.testing.assert_close(apply_prediction_type(additive, velocity, noisy, sigmas), velocity + noisy)
    torch.testing.assert_close(apply_prediction_type(scaled, velocity, noisy, sigmas), noisy - s * velocity)
    # the estimate of the clean latents is compared with the clean latents
    torch.testing.assert_close(training_target(scaled, latents, noise, noisy, sigmas), latents, atol=1e-6, rtol=1e-5)


def test_sigma_sqrt_turns_sigma_scaled_into_the_velocity_loss(case):
    latents, noise, velocity, sigmas, noisy = case
    options = FlowMatchingOptions(model_prediction_type="sigma_scaled", weighting_scheme="sigma_sqrt")
    difference = apply_prediction_type(options, velocity, noisy, sigmas) - training_target(
        options, latents, noise, noisy, sigmas
    )
    weighted = per_item(sigma_weights(options, sigmas), difference) * difference**2
    torch.testing.assert_close(weighted, (velocity - (noise - latents)) ** 2, atol=1e-4, rtol=1e-4)


def test_model_output_of_low_precision_is_compared_in_float32(case):
    _, _, velocity, sigmas, noisy = case
    for kind in ("raw", "additive", "sigma_scaled"):
        options = FlowMatchingOptions(model_prediction_type=kind)
        assert apply_prediction_type(options, velocity.bfloat16(), noisy, sigmas).dtype == torch.float32


def test_loss_weights_are_those_of_diffusers():
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigmas = torch.tensor([0.05, 0.3, 0.5, 0.95, 1.0])
    for scheme in ("sigma_sqrt", "cosmap", "none", "uniform", "logit_normal", "mode"):
        options = FlowMatchingOptions(weighting_scheme=scheme)
        torch.testing.assert_close(
            sigma_weights(options, sigmas), compute_loss_weighting_for_sd3(scheme, sigmas).float()
        )


def test_noise_to_signal_is_the_inverse_root_of_the_flow_snr():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert noise_to_signal(sigmas).tolist() == [0, pytest.approx(1 / 3), 1, math.inf]


def test_the_objective_is_named():
    assert "raw is recommended" in objective_notice(FlowMatchingOptions())
    assert "recommended" not in objective_notice(FlowMatchingOptions(model_prediction_type="raw"))


@pytest.mark.parametrize(
    ("sampling", "scheme", "used"),
    [
        ("sigma", "uniform", {"weighting_scheme"}),
        ("sigma", "logit_normal", {"weighting_scheme", "logit_mean", "logit_std"}),
        ("sigma", "mode", {"weighting_scheme", "mode_scale"}),
        ("uniform", "cosmap", {"weighting_scheme"}),
        ("uniform", "mode", set()),
        ("sigmoid", "logit_normal", {"sigmoid_scale"}),
        ("shift", "sigma_sqrt", {"weighting_scheme", "sigmoid_scale", "discrete_flow_shift"}),
        ("flux_shift", "mode", {"sigmoid_scale"}),
        ("nextdit_shift", "mode", set()),
    ],
)
def test_unused_options_are_those_that_change_neither_noise_levels_nor_weights(sampling, scheme, used):
    def numbers(**change):
        options = FlowMatchingOptions(**{"timestep_sampling": sampling, "weighting_scheme": scheme, **change})
        sigmas = sample_sigmas(options, generators(16), 64)
        return torch.cat([sigmas, sigma_weights(options, sigmas)])

    options = FlowMatchingOptions(timestep_sampling=sampling, weighting_scheme=scheme)
    unused = {name for _, names in unused_flow_options(options) for name in names}
    changes = {"sigmoid_scale": 2.0, "discrete_flow_shift": 1.0, "logit_mean": 1.0, "logit_std": 3.0, "mode_scale": 0.5}
    moved = {name for name, value in changes.items() if not torch.equal(numbers(**{name: value}), numbers())}
    if scheme == "uniform" or not torch.equal(numbers(weighting_scheme="uniform"), numbers()):
        moved.add("weighting_scheme")
    assert moved == used == {*changes, "weighting_scheme"} - unused


def test_defaults_are_those_of_the_flux_script():
    assert dataclasses.asdict(FluxFlowOptions()) == {
        "timestep_sampling": "sigma",
        "sigmoid_scale": 1.0,
        "model_prediction_type": "sigma_scaled",
        "discrete_flow_shift": 3.0,
        "weighting_scheme": "uniform",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "guidance_scale": 3.5,
    }
