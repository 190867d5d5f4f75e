"""Denoising diffusion as Stable Diffusion is trained: noise schedule, noise, targets and loss weights.

A noisy latent is ``sqrt(a_t) * latents + sqrt(1 - a_t) * noise`` for an integer timestep t in 0..999, where a_t is the
product of ``1 - beta`` up to t (Ho et al. 2020, "Denoising Diffusion Probabilistic Models"). The model predicts the
noise, or the velocity ``sqrt(a_t) * noise - sqrt(1 - a_t) * latents`` (Salimans and Ho 2022). ``latents`` are scaled as
the model sees them. What meets a model is float32; the schedule is computed in float64.

Every item has its own CPU generator for each kind of draw, so that no draw depends on which items share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.devices import to_device
from library.models.schedules import TRAIN_STEPS, alphas_cumprod, rescale_to_zero_terminal_snr
from library.randomness import draw_noise, pyramid_layers
from library.training.objective.noise import draw_input_perturbation, draw_uniform, per_item
from library.training.objective.noise_options import NoiseOptions, StableDiffusionNoiseOptions, timestep_bounds
from library.training.objective.objective import Objective
from library.training.objective.step_inputs import ItemDraws, NoisyInput

if TYPE_CHECKING:
    import torch

MAX_SNR = 1000.0
"""Cap on the signal-to-noise ratio inside every loss weight but min-SNR's; only timestep 0 lies above it."""


# --- schedule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseSchedule:
    """What depends on the timestep alone, each [1000] float64 on the CPU."""

    alphas_cumprod: torch.Tensor
    """a_t, rescaled to zero terminal SNR if requested."""
    snr: torch.Tensor
    """a_t / (1 - a_t) *before* that rescaling: loss weights are made of it, and it is never zero."""


def noise_schedule(zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The schedule of all Stable Diffusion models; with ``zero_terminal_snr`` the last timestep is pure noise."""
    alphas = alphas_cumprod()
    return NoiseSchedule(rescale_to_zero_terminal_snr(alphas) if zero_terminal_snr else alphas, alphas / (1 - alphas))


def noise_to_signal(schedule: NoiseSchedule, timesteps: torch.Tensor) -> torch.Tensor:
    """``sqrt((1 - a_t) / a_t)`` at ``timesteps`` [batch], float32; infinite for pure noise."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()


def sample_timesteps(options: NoiseOptions, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A timestep for each generator, uniform in ``--min_timestep`` <= t < ``--max_timestep``, [batch] int64.

    Where both are equal all timesteps are that one. Raises UserError for impossible bounds.
    """
    import torch

    timestep_bounds(options)
    low = options.min_timestep or 0
    high = TRAIN_STEPS if options.max_timestep is None else options.max_timestep
    if low == high:
        return fixed_timesteps(low, len(generators))
    return torch.stack([torch.randint(low, high, (), generator=generator) for generator in generators])


def fixed_timesteps(timestep: int, count: int) -> torch.Tensor:
    """The same timestep ``count`` times, int64; 1000, the end of the scale, means the last one, 999."""
    import torch

    return torch.full((count,), min(timestep, TRAIN_STEPS - 1))


# --- noise ------------------------------------------------------------------------------------------------------------


def add_noise_offset(
    options: StableDiffusionNoiseOptions,
    noise: torch.Tensor,
    latents: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """``noise`` [batch, c, h, w] with ``--noise_offset``: a normal number for each channel, times the strength.

    With ``--noise_offset_random_strength`` each item has a strength of its own between 0 and the option's;
    ``--adaptive_noise_scale`` adds that much of the channel's mean of ``latents``, as absolute value, and the strength
    never falls below 0.
    """
    import torch

    if not options.noise_offset:
        return noise
    strength = torch.full((len(noise), 1, 1, 1), options.noise_offset)
    if options.noise_offset_random_strength:
        strength = strength * per_item(draw_uniform(generators).float(), noise)
    strength = to_device(strength, latents.device)
    if options.adaptive_noise_scale:
        mean = latents.mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + options.adaptive_noise_scale * mean).clamp(min=0)
    return noise + strength * to_device(draw_noise((noise.shape[1], 1, 1), generators), noise.device)


def add_multires_noise(
    options: StableDiffusionNoiseOptions, noise: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """``noise`` [batch, c, h, w] with ``--multires_noise_iterations``: noise of coarser and coarser grids on top of it.

    They are ``pyramid_layers``, discounted by ``--multires_noise_discount``. Each item is divided by its own standard
    deviation, not by that of the batch: so an item does not depend on its neighbours, and two processes train what one
    does.
    """
    import torch

    if not options.multires_noise_iterations:
        return noise
    count, discount = options.multires_noise_iterations, options.multires_noise_discount
    shape = tuple(noise.shape[1:])
    layers = torch.stack([pyramid_layers(shape, count, discount, generator) for generator in generators])
    total = noise + to_device(layers, noise.device)
    return total / total.std(dim=(1, 2, 3), keepdim=True)


def add_noise(
    schedule: NoiseSchedule,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    perturbation: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sqrt(a_t) * latents + sqrt(1 - a_t) * (noise + perturbation)``; tensors [batch, ...], ``timesteps`` [batch]."""
    if perturbation is not None:
        noise = noise + perturbation
    signal, amplitude = _amplitudes(schedule, timesteps, latents)
    return signal * latents + amplitude * noise


def training_target(
    schedule: NoiseSchedule,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    v_parameterization: bool = False,
) -> torch.Tensor:
    """What the model is to predict: ``noise``, or the velocity ``sqrt(a_t) * noise - sqrt(1 - a_t) * latents``.

    ``noise`` is without perturbation.
    """
    if not v_parameterization:
        return noise
    signal, amplitude = _amplitudes(schedule, timesteps, latents)
    return signal * noise - amplitude * latents


def _amplitudes(
    schedule: NoiseSchedule, timesteps: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each [batch, 1, 1, 1], on the device of ``like``."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    parts = (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
    signal, amplitude = (per_item(to_device(part, like.device, like.dtype), like) for part in parts)
    return signal, amplitude


# --- loss weights -----------------------------------------------------------------------------------------------------


def snr_weights(
    options: StableDiffusionNoiseOptions, snr: torch.Tensor, v_parameterization: bool = False
) -> torch.Tensor:
    """The loss weight of each item, [batch] as ``snr``: the product of the options that are on, S = ``snr``.

    ==================================  =====================================  =============================
    option                              noise prediction                       velocity prediction
    ==================================  =====================================  =============================
    min_snr_gamma g                     min(S, g) / S                          min(S, g) / (S + 1)
    scale_v_pred_loss_like_noise_pred                                          S / (S + 1)
    v_pred_like_loss q                  1 + q * (S + 1) / S
    debiased_estimation_loss            1 / sqrt(S)                            1 / (S + 1)
    ==================================  =====================================  =============================

    S is at most 1000 except in the first line. (Hang et al. 2023; Yu et al. 2023, "Debias the Training".)
    """
    weights = snr.new_ones(snr.shape)
    capped = snr.clamp(max=MAX_SNR)
    if options.min_snr_gamma:
        weights = weights * snr.clamp(max=options.min_snr_gamma) / (snr + 1 if v_parameterization else snr)
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * capped / (capped + 1)
    if options.v_pred_like_loss:
        weights = weights * (1 + options.v_pred_like_loss * (capped + 1) / capped)
    if options.debiased_estimation_loss:
        weights = weights / (capped + 1 if v_parameterization else capped.sqrt())
    return weights


# --- one training step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ddpm(Objective):
    """Noise at a timestep of the schedule; the target is the noise, or v. The options, and the schedule of them."""

    noise: NoiseOptions
    options: StableDiffusionNoiseOptions
    v_parameterization: bool
    schedule: NoiseSchedule
    latent_scale: float = 1.0
    """Factor of the latents inside the model."""

    def noisy_input(self, latents: torch.Tensor, draws: ItemDraws, timestep: int | None = None) -> NoisyInput:
        """See ``Objective``."""
        latents = latents * self.latent_scale
        device, shape, schedule = latents.device, tuple(latents.shape[1:]), self.schedule
        if timestep is None:
            timesteps = sample_timesteps(self.noise, draws.generators("timestep"))
        else:
            timesteps = fixed_timesteps(timestep, len(latents))
        noise = to_device(draw_noise(shape, draws.noise_generators("noise")), device)
        noise = add_noise_offset(self.options, noise, latents, draws.generators("noise_offset"))
        noise = add_multires_noise(self.options, noise, draws.noise_generators("multires_noise"))
        extra = draw_input_perturbation(self.noise, shape, draws.noise_generators("ip_noise"))
        weights = snr_weights(self.options, schedule.snr[timesteps], self.v_parameterization)
        return NoisyInput(
            latents=add_noise(schedule, latents, noise, timesteps, None if extra is None else to_device(extra, device)),
            sigmas=to_device(timesteps / TRAIN_STEPS, device),
            target=training_target(schedule, latents, noise, timesteps, self.v_parameterization),
            weights=to_device(weights.float(), device),
            noise_to_signal=to_device(noise_to_signal(schedule, timesteps), device),
        )

    def read_prediction(self, output: torch.Tensor, noisy: NoisyInput) -> torch.Tensor:
        """The output as it is."""
        return output


def timesteps_of(noisy: NoisyInput) -> torch.Tensor:
    """The integer timesteps 0..999 of a noisy input, [batch] int64."""
    return (noisy.sigmas * TRAIN_STEPS).round().long()
