"""Options about the noise that is added to training latents. Which of them a model family uses is stated here."""

from __future__ import annotations

from dataclasses import dataclass

from library.console import warn
from library.errors import UserError


@dataclass
class NoiseOptions:
    """Noise (every model family)"""

    min_timestep: int | None = None
    """Smallest timestep that is trained, 0 to 1000; unset means 0."""
    max_timestep: int | None = None
    """Largest timestep that is trained, 0 to 1000; unset means 1000."""
    ip_noise_gamma: float | None = None
    """Input perturbation: strength of extra noise in the input that the target does not contain; 0.1 is usual."""
    ip_noise_gamma_random_strength: bool = False
    """Multiply --ip_noise_gamma by a random number between 0 and 1 for every item."""
    noise_on_device: bool = False
    """Draw noise on the GPU: faster for small models, but other devices draw other noise from the same seed."""


@dataclass
class StableDiffusionNoiseOptions:
    """Noise and loss weighting (Stable Diffusion only)"""

    noise_offset: float | None = None
    """Add an offset of this strength, constant over each channel, to the noise; 0.1 is usual."""
    noise_offset_random_strength: bool = False
    """Multiply --noise_offset by a random number between 0 and 1 for every item."""
    adaptive_noise_scale: float | None = None
    """Add this much of the mean absolute latent value to --noise_offset."""
    multires_noise_iterations: int | None = None
    """Add noise of this many ever coarser resolutions; 6 to 10 is usual."""
    multires_noise_discount: float = 0.3
    """Strength of each coarser resolution relative to the one before, for --multires_noise_iterations."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise."""
    min_snr_gamma: float | None = None
    """Limit the loss weight of steps with a high signal-to-noise ratio to this value; 5 is usual."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weight the v-prediction loss as noise prediction would (needs --v_parameterization)."""
    v_pred_like_loss: float | None = None
    """Add a v-prediction-like loss of this strength (not with --v_parameterization)."""
    debiased_estimation_loss: bool = False
    """Weight the loss by the debiased estimation of the signal-to-noise ratio."""


NEEDS = {
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "noise_offset_random_strength": "noise_offset",
    "adaptive_noise_scale": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
}
"""Options that have no effect unless another one is given and not 0."""


def timestep_bounds(options: NoiseOptions) -> tuple[float, float]:
    """``--min_timestep`` and ``--max_timestep`` as sigmas (lo, hi) in 0..1.

    Raises UserError unless 0 <= min <= max <= 1000.
    """
    low = 0 if options.min_timestep is None else options.min_timestep
    high = 1000 if options.max_timestep is None else options.max_timestep
    if not 0 <= low <= high <= 1000:
        raise UserError(
            f"--min_timestep {low}, --max_timestep {high}: must be 0 <= min_timestep <= max_timestep <= 1000."
        )
    return low / 1000, high / 1000


def check_noise_options(options: NoiseOptions) -> None:
    """Raise UserError for timestep bounds or a perturbation strength that make no sense."""
    timestep_bounds(options)
    if options.ip_noise_gamma is not None and options.ip_noise_gamma < 0:
        raise UserError(f"--ip_noise_gamma {options.ip_noise_gamma} must not be negative.")


def check_stable_diffusion_noise_options(options: StableDiffusionNoiseOptions, v_parameterization: bool) -> None:
    """Raise UserError for values that make no sense and for combinations that contradict each other."""
    for name in ("multires_noise_iterations", "min_snr_gamma", "v_pred_like_loss"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} {value} must not be negative.")
    if options.noise_offset and options.multires_noise_iterations:
        warn("--noise_offset and --multires_noise_iterations are meant to be used one without the other; both act.")
    if options.adaptive_noise_scale and options.noise_offset is None:
        raise UserError("--adaptive_noise_scale changes --noise_offset; give --noise_offset too.")
    if options.scale_v_pred_loss_like_noise_pred and not v_parameterization:
        raise UserError("--scale_v_pred_loss_like_noise_pred needs --v_parameterization.")
    if options.v_pred_like_loss and v_parameterization:
        raise UserError("--v_pred_like_loss imitates --v_parameterization; give only one of the two.")
