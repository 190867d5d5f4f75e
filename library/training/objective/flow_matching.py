"""Flow matching: how much noise a latent gets, and what the model's velocity is compared with.

A noisy latent is ``(1 - sigma) * latents + sigma * noise`` with sigma in 0..1; the model predicts the velocity
``noise - latents`` (Lipman et al. 2023; Esser et al. 2024, "Scaling Rectified Flow Transformers"). All is float32.

Every item has its own generator for each kind of draw, so that no draw depends on which items share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from library.devices import to_device
from library.models.schedules import TRAIN_STEPS, flux_shift, shift_sigmas
from library.randomness import draw_noise
from library.training.objective.noise import draw_input_perturbation, draw_uniform, per_item
from library.training.objective.noise_options import NoiseOptions, timestep_bounds
from library.training.objective.objective import Objective
from library.training.objective.step_inputs import ItemDraws, NoisyInput

if TYPE_CHECKING:
    import torch

TABLE_SHIFT = 3.0
"""Shift of the table behind ``--timestep_sampling sigma`` where ``--discrete_flow_shift`` is for ``shift`` alone."""

TimestepSampling = Literal["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"]


@dataclass
class FlowMatchingOptions:
    """Flow matching"""

    shifts_table: ClassVar[bool] = False
    """Whether the family's ``--discrete_flow_shift`` also shifts the table of ``--timestep_sampling sigma``."""

    timestep_sampling: TimestepSampling = "sigma"
    """How noise levels are drawn; recommended: flux_shift for FLUX.1, sigmoid for Chroma, nextdit_shift for Lumina."""
    sigmoid_scale: float = 1.0
    """Scale of the normal distribution behind the sigmoid in sigmoid, shift and flux_shift sampling."""
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = "sigma_scaled"
    """What the loss compares: velocity (raw, recommended), velocity + input (additive) or latents (sigma_scaled)."""
    discrete_flow_shift: float = 3.0
    """Shift of the noise levels towards more noise, only for --timestep_sampling shift."""
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"] = "uniform"
    """Loss weight per noise level (sigma_sqrt, cosmap) or its density in sigma sampling (logit_normal, mode)."""
    logit_mean: float = 0.0
    """Mean of the normal distribution of --weighting_scheme logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of the normal distribution of --weighting_scheme logit_normal."""
    mode_scale: float = 1.29
    """Strength of --weighting_scheme mode."""


def objective_notice(options: FlowMatchingOptions) -> str:
    """A line to say once at the start: what is trained."""
    return {
        "raw": "Training the flow velocity (--model_prediction_type raw).",
        "additive": "Training velocity plus input (--model_prediction_type additive): the same objective as raw.",
        "sigma_scaled": "Training the estimate of the clean latents (--model_prediction_type sigma_scaled); "
        "raw is recommended.",
    }[options.model_prediction_type]


def unused_flow_options(options: FlowMatchingOptions) -> list[tuple[str, list[str]]]:
    """Reasons and names (without --) of options that would change nothing in this combination."""
    sampling, scheme = options.timestep_sampling, options.weighting_scheme
    shifted = ("shift", "sigma") if options.shifts_table else ("shift",)
    unused = [] if sampling in shifted else ["discrete_flow_shift"]
    if sampling in ("sigma", "uniform", "nextdit_shift"):
        unused.append("sigmoid_scale")
    if sampling != "sigma" and scheme in ("logit_normal", "mode"):
        unused.append("weighting_scheme")
    others = [] if scheme == "logit_normal" else ["logit_mean", "logit_std"]
    others += [] if scheme == "mode" else ["mode_scale"]
    if sampling != "sigma":
        unused += ["logit_mean", "logit_std", "mode_scale"]
    return [(f"with --timestep_sampling {sampling}", unused), (f"with --weighting_scheme {scheme}", others)]


# --- noise levels -----------------------------------------------------------------------------------------------------


def sigma_table(shift: float = TABLE_SHIFT) -> torch.Tensor:
    """The discrete noise levels, [1000] float32, descending from 1; there is no zero among them."""
    import torch

    return shift_sigmas(torch.arange(TRAIN_STEPS, 0, -1, dtype=torch.float64) / TRAIN_STEPS, shift).float()


def sample_sigmas(
    options: FlowMatchingOptions,
    generators: Sequence[torch.Generator],
    image_tokens: int,
    bounds: NoiseOptions | None = None,
) -> torch.Tensor:
    """One noise level per generator, [batch] float32 on the CPU, within ``--min_timestep`` and ``--max_timestep``.

    ``image_tokens`` is (latent height / 2) * (latent width / 2) and only matters for ``flux_shift`` and
    ``nextdit_shift``. Each generator gives exactly one number. Raises UserError for impossible bounds.
    """
    sampling = options.timestep_sampling
    if sampling == "sigma":
        table = sigma_table(options.discrete_flow_shift if options.shifts_table else TABLE_SHIFT)
        sigmas = table.double()[_table_indices(options, generators)]
    elif sampling in ("uniform", "nextdit_shift"):
        sigmas = draw_uniform(generators)
    else:
        sigmas = (options.sigmoid_scale * _normal(generators)).sigmoid()
    if sampling == "shift":
        sigmas = shift_sigmas(sigmas, options.discrete_flow_shift)
    elif sampling in ("flux_shift", "nextdit_shift"):
        sigmas = shift_sigmas(sigmas, flux_shift(image_tokens))
    low, high = timestep_bounds(bounds or NoiseOptions())
    return (low + (high - low) * sigmas).float()


def _table_indices(options: FlowMatchingOptions, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Indices into the table with the density of ``--weighting_scheme`` (Esser et al. 2024, section 3.1)."""
    if options.weighting_scheme == "logit_normal":
        u = (options.logit_mean + options.logit_std * _normal(generators)).sigmoid()
    else:
        u = draw_uniform(generators)
        if options.weighting_scheme == "mode":
            u = 1 - u - options.mode_scale * ((math.pi * u / 2).cos() ** 2 - 1 + u)
    return (u * TRAIN_STEPS).floor().long().clamp(0, TRAIN_STEPS - 1)


def _normal(generators: Sequence[torch.Generator]) -> torch.Tensor:
    import torch

    return torch.stack([torch.randn((), generator=generator, dtype=torch.float64) for generator in generators])


# --- noise ------------------------------------------------------------------------------------------------------------


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, perturbation: torch.Tensor | None = None
) -> torch.Tensor:
    """``(1 - sigma) * latents + sigma * (noise + perturbation)``; tensors [batch, ...], sigmas [batch], float32."""
    sigmas = per_item(sigmas, latents)
    if perturbation is not None:
        noise = noise + perturbation
    return (1 - sigmas) * latents + sigmas * noise


# --- what is compared -------------------------------------------------------------------------------------------------


def apply_prediction_type(
    options: FlowMatchingOptions, velocity: torch.Tensor, noisy: torch.Tensor, sigmas: torch.Tensor
) -> torch.Tensor:
    """What ``--model_prediction_type`` makes of a velocity, float32, shaped as ``velocity``.

    raw: the velocity; additive: velocity + noisy; sigma_scaled: noisy - sigma * velocity.
    """
    velocity = velocity.float()
    if options.model_prediction_type == "raw":
        return velocity
    if options.model_prediction_type == "additive":
        return velocity + noisy
    return noisy - per_item(sigmas, noisy) * velocity


def training_target(
    options: FlowMatchingOptions,
    latents: torch.Tensor,
    noise: torch.Tensor,
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
) -> torch.Tensor:
    """What a perfect model, whose velocity is ``noise - latents``, would give after ``apply_prediction_type``.

    For sigma_scaled these are the clean latents, as in Stable Diffusion 3. ``noise`` is without perturbation.
    """
    return apply_prediction_type(options, noise - latents, noisy, sigmas)


def sigma_weights(options: FlowMatchingOptions, sigmas: torch.Tensor) -> torch.Tensor:
    """Loss weight per item, [batch] float32: sigma_sqrt 1/s^2, cosmap 2/(pi (1 - 2s + 2s^2)), others 1."""
    if options.weighting_scheme == "sigma_sqrt":
        return sigmas**-2.0
    if options.weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return sigmas.new_ones(sigmas.shape)


def noise_to_signal(sigmas: torch.Tensor) -> torch.Tensor:
    """``sqrt(1 / SNR)`` of the flow path, s / (1 - s), [batch]; infinite for pure noise."""
    return sigmas / (1 - sigmas)


# --- one training step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowMatching(Objective):
    """A point between image and noise, and the velocity there. A family's own defaults are those of its options."""

    options: FlowMatchingOptions
    noise: NoiseOptions
    patch_size: int = 2
    """Side of the square of latents that is one token of the transformer."""
    latent_scale: float = 1.0
    """What cached latents are multiplied by."""

    def noisy_input(self, latents: torch.Tensor, draws: ItemDraws, timestep: int | None = None) -> NoisyInput:
        """See ``Objective``."""
        import torch

        latents = latents * self.latent_scale if self.latent_scale != 1 else latents
        device, shape = latents.device, tuple(latents.shape[1:])
        if timestep is None:
            tokens = (shape[1] // self.patch_size) * (shape[2] // self.patch_size)
            sigmas = to_device(sample_sigmas(self.options, draws.generators("sigma"), tokens, self.noise), device)
        else:
            sigmas = torch.full((len(latents),), timestep / 1000, device=device)
        noise = to_device(draw_noise(shape, draws.noise_generators("noise")), device)
        extra = draw_input_perturbation(self.noise, shape, draws.noise_generators("ip_noise"))
        noisy = add_noise(latents, noise, sigmas, None if extra is None else to_device(extra, device))
        return NoisyInput(
            latents=noisy,
            sigmas=sigmas,
            target=training_target(self.options, latents, noise, noisy, sigmas),
            weights=sigma_weights(self.options, sigmas),
            noise_to_signal=noise_to_signal(sigmas),
        )

    def read_prediction(self, output: torch.Tensor, noisy: NoisyInput) -> torch.Tensor:
        """The velocity, as ``--model_prediction_type`` reads it."""
        return apply_prediction_type(self.options, output, noisy.latents, noisy.sigmas)
