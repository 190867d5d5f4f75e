"""Gradual Latent: an image that begins small and grows from step to step, in ancestral Euler steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.console import warn
from library.models.sampling import DiffusersSolver, Solver, Step, StepHook
from library.randomness import draw_noise

SIZE_MULTIPLE = 8
"""Latent positions that both sides are multiples of while an image grows."""


@dataclass(frozen=True)
class Unsharp:
    """How what has been enlarged is sharpened: by ``strength`` times its difference from its blurred self."""

    kernel: int
    """Width of the blur, an odd number of latent positions."""
    sigma: float
    strength: float
    target: bool = True
    """Whether the latents after a step are enlarged, or those before it and the step's direction."""


@dataclass(frozen=True)
class Growth:
    """When and how an image grows."""

    timesteps: int
    """It grows at timesteps below this one."""
    ratio: float
    """The share of height and width that it begins with."""
    ratio_step: float
    every_n_steps: int
    s_noise: float
    """Strength of the noise that a growing step adds."""
    unsharp: Unsharp | None = None


class GradualLatent(StepHook):
    """Puts growing steps into the place of ancestral Euler's."""

    def __init__(self, growth: Growth):
        self.growth = growth

    def solver(self, solver: Solver) -> Solver:
        """The growing one. Raises TypeError for another sampler than ``euler_a``."""
        scheduler = getattr(solver, "scheduler", None)
        if not isinstance(solver, DiffusersSolver) or type(scheduler).__name__ != "EulerAncestralDiscreteScheduler":
            raise TypeError("only the solver of euler_a grows")
        return GrowingEuler(solver, self.growth)


class GrowingEuler(Solver):
    """Ancestral Euler steps, as diffusers computes them, between which the latents grow to their full size.

    What is left to grow after the last step that may, the last step catches up on, with a warning.
    """

    def __init__(self, solver: DiffusersSolver, growth: Growth):
        self.plain = solver
        self.growth = growth
        self.timesteps = solver.timesteps
        self.sigmas = solver.scheduler.sigmas.double().tolist()
        self.predicts_v = solver.scheduler.config.prediction_type == "v_prediction"
        self.ratio = growth.ratio
        self.since = growth.every_n_steps
        self.full = torch.Size()
        """Height and width in the end."""
        self.size = torch.Size()
        """Height and width now."""

    def start(self, noise: Tensor, image: Tensor | None = None, first: int = 0) -> Tensor:
        """As without growing, but small."""
        latents = self.plain.start(noise, image, first)
        self.full = latents.shape[-2:]
        if self.ratio < 1 and first < len(self.timesteps):
            latents = _interpolated(latents, scale_factor=self.ratio)
            latents = sharpened(latents, self.growth.unsharp)
        self.size = latents.shape[-2:]
        return latents

    def noisy_image(self, index: int) -> Tensor:
        """As the solver's that does not grow, in the current size."""
        image, noise = self.plain.image, self.plain.noise
        assert image is not None
        sigma = self.sigmas[index]
        if image.shape[-2:] != self.size:
            image = _interpolated(image, size=self.size)
            noise = torch.nn.functional.interpolate(noise, size=self.size)  # nearest: its variance stays 1
        return image + sigma * noise

    def model_input(self, latents: Tensor, step: Step) -> Tensor:
        """Of unit variance."""
        return latents / (self.sigmas[step.index] ** 2 + 1) ** 0.5

    def advance(self, prediction: Tensor, latents: Tensor, step: Step, generators: Sequence[torch.Generator]) -> Tensor:
        """A step of ancestral Euler; in one that grows, the noise is that of the new size."""
        now, then = self.sigmas[step.index], self.sigmas[step.index + 1]
        up = (then**2 * (now**2 - then**2) / now**2) ** 0.5
        length = (then**2 - up**2) ** 0.5 - now
        direction = prediction
        if self.predicts_v:
            image = latents / (now**2 + 1) - prediction * now / (now**2 + 1) ** 0.5
            direction = (latents - image) / now
        target = self._target(step)
        unsharp = self.growth.unsharp
        if target == self.size:
            latents, strength = latents + direction * length, 1.0
        elif unsharp is None or unsharp.target:
            latents = sharpened(_interpolated(latents + direction * length, size=target), unsharp)
            strength = self.growth.s_noise
        else:
            latents = sharpened(_interpolated(latents, size=target), unsharp)
            latents = latents + _interpolated(direction, size=target) * length
            strength = self.growth.s_noise
        self.size = target
        if generators:
            noise = draw_noise(latents.shape[1:], generators).to(latents)
        else:
            noise = torch.randn_like(latents)
        return latents + noise * (up * strength)

    def _target(self, step: Step) -> torch.Size:
        """Height and width after ``step``."""
        growth = self.growth
        due = self.since >= growth.every_n_steps and float(step.timestep) < growth.timesteps
        self.since += 1
        if self.ratio >= 1:
            return self.size
        if due:
            self.since = 1
            self.ratio = min(round(self.ratio + growth.ratio_step, 6), 1.0)
        if step.index == step.count - 1 and self.ratio < 1:
            warn(
                f"Gradual Latent: the steps ended at {self.ratio:g} of the size; the last one enlarges the image. "
                "Let it grow earlier, in larger steps or more often."
            )
            self.ratio = 1.0
        if self.ratio >= 1:
            return self.full
        if not due:
            return self.size
        sides = (int(side * self.ratio) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in self.full)
        return torch.Size(max(side, before) for side, before in zip(sides, self.size))


def _interpolated(latents: Tensor, **to: object) -> Tensor:
    """[B, C, h, w] bicubic, in another size."""
    return torch.nn.functional.interpolate(latents, mode="bicubic", align_corners=False, **to)  # type: ignore[arg-type]


def sharpened(latents: Tensor, unsharp: Unsharp | None) -> Tensor:
    """[B, C, h, w] with more contrast between neighbours; as they are without ``unsharp``."""
    if unsharp is None:
        return latents
    return latents + (latents - blurred(latents, unsharp.kernel, unsharp.sigma)) * unsharp.strength


def blurred(latents: Tensor, kernel: int, sigma: float) -> Tensor:
    """[B, C, h, w] under a Gaussian of ``kernel`` x ``kernel`` positions, mirrored at the borders."""
    half = (kernel - 1) // 2
    weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float32) / sigma) ** 2).to(latents)
    weights = weights / weights.sum()
    channels = latents.shape[1]
    square = (weights[:, None] * weights).expand(channels, 1, kernel, kernel)
    padded = torch.nn.functional.pad(latents, [half] * 4, mode="reflect")
    return torch.nn.functional.conv2d(padded, square, groups=channels)
