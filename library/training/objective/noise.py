"""Noise for training latents, drawn in the same way for every model family.

Every item has its own generator for each kind of draw, so that no draw depends on which items share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.randomness import draw_noise
from library.training.objective.noise_options import NoiseOptions

if TYPE_CHECKING:
    import torch


def draw_uniform(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A number in [0, 1) for each item, [batch] on the generators' device; float64 on the CPU, else float32."""
    import torch

    return torch.stack(
        [
            torch.rand((), generator=g, device=g.device, dtype=torch.float64 if g.device.type == "cpu" else None)
            for g in generators
        ]
    )


def draw_input_perturbation(
    options: NoiseOptions, item_shape: Sequence[int], generators: Sequence[torch.Generator]
) -> torch.Tensor | None:
    """The extra noise of ``--ip_noise_gamma`` (Ning et al. 2023), [batch, *item_shape] float32, or None without it.

    With ``--ip_noise_gamma_random_strength`` each item has its own strength between 0 and gamma.
    """
    if not options.ip_noise_gamma:
        return None
    perturbation = options.ip_noise_gamma * draw_noise(item_shape, generators)
    if options.ip_noise_gamma_random_strength:
        perturbation = perturbation * per_item(draw_uniform(generators).float(), perturbation)
    return perturbation


def per_item(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View [batch] values as [batch, 1, 1, ...] so that they scale whole items of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
