"""Gradual Latent: the image begins small and grows while it is drawn (sampler euler_a)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from library.console import warn
from library.errors import UserError
from library.generation.features import Batch, Feature, value_or
from library.generation.image_prompts import ImagePrompt
from library.options import Aliases

if TYPE_CHECKING:
    from library.models.sampling import StepHook
    from library.models.stable_diffusion.gradual_latent import Growth, Unsharp

SAMPLERS = ("euler_a", "k_euler_a")


@dataclass
class GradualLatentOptions:
    """Gradual Latent"""

    gradual_latent_timesteps: int | None = None
    """The image grows below this timestep, 999 (noise) to 0 (image); 750 is usual, unset means no Gradual Latent."""
    gradual_latent_ratio: float = 0.5
    """The share of its height and width that it begins with, above 0 to 1."""
    gradual_latent_ratio_step: float = 0.125
    """By how much the share grows each time."""
    gradual_latent_every_n_steps: Annotated[int, Aliases("gradual_latent_ratio_every_n_steps")] = 3
    """Steps between two enlargements."""
    gradual_latent_s_noise: float = 1.0
    """Strength of the noise that a growing step adds."""
    gradual_latent_unsharp_params: str | None = None
    """Sharpen what has grown: "ksize,sigma,strength" or "ksize,sigma,strength,target_x", such as 3,0.5,0.5,1."""


def open_gradual_latent() -> GradualLatentFeature:
    """Gradual Latent for the images whose prompts, or the command line, request it."""
    return GradualLatentFeature()


class GradualLatentFeature(Feature):
    """Acts where a prompt has ``gradual_latent_timesteps``; with another sampler, a warning is logged."""

    option = "--gradual_latent_timesteps"

    def __init__(self) -> None:
        self.warned = False

    def acts_on(self, prompt: ImagePrompt) -> bool:
        """Whether the prompt has timesteps, and the sampler is euler_a."""
        if prompt.gradual_latent_timesteps is None:
            return False
        if prompt.sample_sampler not in SAMPLERS and not self.warned:
            self.warned = True
            warn(f"Gradual Latent needs --sampler euler_a; it has no effect with {prompt.sample_sampler}.")
        return prompt.sample_sampler in SAMPLERS

    def check(self, prompt: ImagePrompt, place: str) -> None:
        """Raises UserError, beginning with ``place``, for numbers by which nothing can grow."""
        growth = self.growth(prompt, place)
        limits = (
            ("--gradual_latent_timesteps (--glt)", growth.timesteps, 0 <= growth.timesteps <= 1000, "from 0 to 1000"),
            ("--gradual_latent_ratio (--glr)", growth.ratio, 0 < growth.ratio <= 1, "above 0 and at most 1"),
            ("--gradual_latent_ratio_step (--gls)", growth.ratio_step, growth.ratio_step > 0, "above 0"),
            ("--gradual_latent_every_n_steps (--gle)", growth.every_n_steps, growth.every_n_steps > 0, "at least 1"),
            ("--gradual_latent_s_noise (--glsn)", growth.s_noise, growth.s_noise >= 0, "at least 0"),
        )
        for option, value, fits, wanted in limits:
            if not fits:
                raise UserError(f"{place}{option} must be {wanted}, not {value:g}.")

    def growth(self, prompt: ImagePrompt, place: str = "") -> Growth:
        """What the prompt says, with the options' defaults for the rest."""
        from library.models.stable_diffusion.gradual_latent import Growth

        default, own = GradualLatentOptions(), prompt
        assert own.gradual_latent_timesteps is not None
        return Growth(
            timesteps=own.gradual_latent_timesteps,
            ratio=value_or(own.gradual_latent_ratio, default.gradual_latent_ratio),
            ratio_step=value_or(own.gradual_latent_ratio_step, default.gradual_latent_ratio_step),
            every_n_steps=value_or(own.gradual_latent_every_n_steps, default.gradual_latent_every_n_steps),
            s_noise=value_or(own.gradual_latent_s_noise, default.gradual_latent_s_noise),
            unsharp=parse_unsharp(own.gradual_latent_unsharp_params, place),
        )

    def key(self, prompt: ImagePrompt) -> Hashable:
        """Images that are generated together grow alike."""
        return self.growth(prompt) if self.acts_on(prompt) else None

    def hook(self, batch: Batch) -> StepHook | None:
        """What grows in the loop."""
        from library.models.stable_diffusion.gradual_latent import GradualLatent

        return GradualLatent(self.growth(batch.prompts[0])) if self.acts_on(batch.prompts[0]) else None

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """Timesteps, ratio, its step, the interval, the strength of the noise, and how it is sharpened."""
        if not self.acts_on(prompt):
            return {}
        growth = self.growth(prompt)
        numbers = (growth.timesteps, growth.ratio, growth.ratio_step, growth.every_n_steps, growth.s_noise)
        sharp = prompt.gradual_latent_unsharp_params
        unsharp = {} if sharp is None else {"gradual-latent-unsharp": sharp}
        return {"gradual-latent": ",".join(f"{number:g}" for number in numbers), **unsharp}


def parse_unsharp(text: str | None, place: str = "") -> Unsharp | None:
    """``"ksize,sigma,strength"`` or ``"ksize,sigma,strength,target_x"``; None for None.

    Raises UserError, beginning with ``place``, for anything else.
    """
    if text is None:
        return None
    from library.models.stable_diffusion.gradual_latent import Unsharp

    parts = text.split(",")
    try:
        kernel, sigma, strength = int(parts[0]), float(parts[1]), float(parts[2])
        target = bool(int(parts[3])) if len(parts) == 4 else True
        if len(parts) > 4 or kernel < 1 or kernel % 2 == 0 or not sigma > 0 or not abs(strength) < float("inf"):
            raise ValueError
    except (ValueError, IndexError):
        raise UserError(
            f"{place}--gradual_latent_unsharp_params (--glus) must be an odd whole number, two numbers and, if "
            f'wanted, 0 or 1, with commas between them, such as 3,0.5,0.5,1, not "{text}".'
        ) from None
    return Unsharp(kernel, sigma, strength, target)
