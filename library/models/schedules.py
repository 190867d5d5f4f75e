"""Noise schedules of every family: how much noise there is at a timestep, in training and in sampling.

Importing this module loads no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TRAIN_STEPS = 1000
"""Timesteps of every schedule: 0..999 in diffusion models, sigma = timestep / 1000 in flow models."""

# ---- denoising diffusion: Stable Diffusion's betas, evenly spaced in their square roots -----------------------------

FIRST_BETA, LAST_BETA = 0.00085, 0.012


def alphas_cumprod() -> torch.Tensor:
    """The product of ``1 - beta`` up to each timestep, [1000] float64: the share of the image in a noisy latent."""
    import torch

    roots = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TRAIN_STEPS, dtype=torch.float64)
    return (1 - roots**2).cumprod(0)


def rescale_to_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shift and stretch sqrt(a_t): its last value becomes 0, its first one stays (Lin et al. 2023, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)) ** 2


# ---- flow matching: a noisy latent is (1 - sigma) * latents + sigma * noise ---------------------------------------

FLUX_TOKENS_AND_MU = ((256, 0.5), (4096, 1.15))
"""FLUX.1's shift depends on the image: mu is linear in the number of image tokens through these two points."""


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """``shift * s / (1 + (shift - 1) * s)``: more weight on high noise for shift > 1; 0 and 1 stay where they are."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flux_shift(image_tokens: int) -> float:
    """FLUX.1's shift, e^mu, for an image of this many tokens (latent height/2 * width/2)."""
    (low, low_mu), (high, high_mu) = FLUX_TOKENS_AND_MU
    return math.exp(low_mu + (high_mu - low_mu) * (image_tokens - low) / (high - low))


def flow_sigmas(steps: int, shift: float = 1.0) -> torch.Tensor:
    """``steps`` + 1 sigmas from 1 to 0, float32, evenly spaced before they are shifted."""
    import torch

    return shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def lumina_sigmas(steps: int, shift: float = 6.0) -> torch.Tensor:
    """``steps`` + 1 sigmas from 1 to 0, float32, on Lumina Image 2.0's grid.

    The last sigma before 0 is the smallest of a shifted table of 1000, shifted once more; the others are evenly spaced
    between it and 1 before that second shift. That is how Stable Diffusion 3's flow-matching scheduler spaces them.
    """
    import torch

    smallest = shift_sigmas(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float64), shift)
    sigmas = shift_sigmas(torch.linspace(1, smallest.item(), steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
