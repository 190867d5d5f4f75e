"""Size, steps, sampler and start noise of ``gen_img.py``, and the prompt that the command line makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.generation.image_prompts import ImagePrompt, check_side

SIDES = {"sd1": 512, "sd2": 512, "sdxl": 1024}
"""The side of an image, in pixels, unless another is given."""
PROMPT_FIELDS = {
    "width": "W",
    "height": "H",
    "sample_steps": "steps",
    "sample_sampler": "sampler",
    "scale": "scale",
    "negative_scale": "negative_scale",
    "original_height": "original_height",
    "original_width": "original_width",
    "original_height_negative": "original_height_negative",
    "original_width_negative": "original_width_negative",
    "crop_top": "crop_top",
    "crop_left": "crop_left",
    "strength": "strength",
    "deep_shrink_depth_1": "ds_depth_1",
    "deep_shrink_timesteps_1": "ds_timesteps_1",
    "deep_shrink_depth_2": "ds_depth_2",
    "deep_shrink_timesteps_2": "ds_timesteps_2",
    "deep_shrink_ratio": "ds_ratio",
    "gradual_latent_timesteps": "gradual_latent_timesteps",
    "gradual_latent_ratio": "gradual_latent_ratio",
    "gradual_latent_ratio_step": "gradual_latent_ratio_step",
    "gradual_latent_every_n_steps": "gradual_latent_every_n_steps",
    "gradual_latent_s_noise": "gradual_latent_s_noise",
    "gradual_latent_unsharp_params": "gradual_latent_unsharp_params",
}
"""A prompt's field -> the option that gives its default."""


@dataclass
class SamplingOptions:
    """Sampling"""

    W: int | None = None
    """Width in pixels, a multiple of 8; unset means 512, or 1024 for SDXL."""
    H: int | None = None
    """Height in pixels, a multiple of 8; unset means 512, or 1024 for SDXL."""
    steps: int = 50
    """Denoising steps."""
    sampler: str = "ddim"
    """Sampler: ddim, pndm, lms, euler, euler_a, heun, dpm_2, dpm_2_a, dpmsolver, dpmsolver++ or dpmsingle."""
    scale: float = 7.5
    """Classifier-free guidance; 1 or less turns it off."""
    negative_scale: float | None = None
    """Guidance away from the negative prompt by a scale of its own; unset means that it takes the empty one's place."""
    original_height: int | None = None
    """SDXL: original height given to the model as conditioning; unset means the height of the image."""
    original_width: int | None = None
    """SDXL: original width given to the model as conditioning; unset means the width of the image."""
    original_height_negative: int | None = None
    """SDXL: the same height for the negative prompt; unset means that of the prompt."""
    original_width_negative: int | None = None
    """SDXL: the same width for the negative prompt; unset means that of the prompt."""
    crop_top: int | None = None
    """SDXL: top crop coordinate given to the model as conditioning; unset means 0."""
    crop_left: int | None = None
    """SDXL: left crop coordinate given to the model as conditioning; unset means 0."""
    pyramid_noise_prob: float | None = None
    """Probability that an image begins with pyramid noise, 0..1."""
    pyramid_noise_discount_range: list[float] | None = None
    """Least and largest discount of pyramid noise from one size to the next."""
    noise_offset_prob: float | None = None
    """Probability that the noise of an image is brightened or darkened as a whole, 0..1."""
    noise_offset_range: list[float] | None = None
    """Two numbers: the offset's smallest value, and that plus its standard deviation."""
    force_scheduler_zero_steps_offset: bool = False
    """Begin img2img exactly at the noise of its first step, not one step below it."""


def check_sampling(options: SamplingOptions) -> None:
    """Raises UserError for values that give no image; the sampler's name is the model family's affair."""
    for side in ("W", "H"):
        check_side(getattr(options, side), f"--{side}")
    for name, key in (("pyramid_noise", "pyramid_noise_discount_range"), ("noise_offset", "noise_offset_range")):
        probability, bounds = getattr(options, f"{name}_prob"), getattr(options, key)
        if probability is not None and not 0 <= probability <= 1:
            raise UserError(f"--{name}_prob must be between 0 and 1, not {probability:g}.")
        if bounds is not None and len(bounds) != 2:
            raise UserError(f"--{key} takes two numbers, not {len(bounds)}.")
        if probability and bounds is None:
            raise UserError(f"--{name}_prob needs --{key} with two numbers.")
    if min(options.pyramid_noise_discount_range or [0]) < 0:
        raise UserError("--pyramid_noise_discount_range must not be negative.")


def default_prompt(options: SamplingOptions, variant: str, *groups: Any) -> ImagePrompt:
    """The command line as a prompt for a model of that ``variant`` (sd1, sd2 or sdxl).

    ``groups`` are the options of features that a prompt may set, too: StartImageOptions and so on.
    """
    side = SIDES[variant]
    given = {
        field: getattr(group, option)
        for group in (options, *groups)
        for field, option in PROMPT_FIELDS.items()
        if hasattr(group, option)
    }
    return ImagePrompt(**{"width": side, "height": side, **{k: v for k, v in given.items() if v is not None}})


def request_fields(options: SamplingOptions) -> dict[str, Any]:
    """What the options say of every image's request, by the request's fields."""
    return {
        "offset_start": not options.force_scheduler_zero_steps_offset,
        "pyramid_noise": _perturbation(options.pyramid_noise_prob, options.pyramid_noise_discount_range),
        "noise_offset": _perturbation(options.noise_offset_prob, options.noise_offset_range),
    }


def sampling_settings(options: SamplingOptions, drawn_over: bool) -> dict[str, str]:
    """What the text in an image's file says of the start noise, by key; ``drawn_over``: it begins with an image."""
    if drawn_over:
        return {"force-scheduler-zero-steps-offset": "true"} if options.force_scheduler_zero_steps_offset else {}
    fields = request_fields(options)
    given = {"pyramid-noise": fields["pyramid_noise"], "noise-offset": fields["noise_offset"]}
    return {key: ",".join(f"{number:g}" for number in numbers) for key, numbers in given.items() if numbers}


def _perturbation(probability: float | None, bounds: Sequence[float] | None) -> tuple[float, float, float] | None:
    """Probability, smallest and largest value; None where it never happens."""
    return (probability, bounds[0], bounds[1]) if probability and bounds else None
