"""FLUX.1's noise schedule and its denoising loop (Euler steps along the velocity)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# Resolution-dependent shift: mu is linear in the number of image tokens through these two points.
TOKENS_AND_MU = ((256, 0.5), (4096, 1.15))


def shift_mu(image_tokens: int) -> float:
    """The shift exponent for an image of ``image_tokens`` packed latents (16 x 16 pixels each)."""
    (low, low_mu), (high, high_mu) = TOKENS_AND_MU
    return low_mu + (high_mu - low_mu) * (image_tokens - low) / (high - low)


def shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1/sigma - 1): moves sigmas in 0..1 towards noise for mu > 0; 0 and 1 stay where they are."""
    factor = math.exp(mu)
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def schedule(steps: int, image_tokens: int, shift: bool = True) -> Tensor:
    """``steps`` + 1 sigmas from 1 to 0, float32; shifted for the image's size, except for schnell-like models."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift_sigmas(sigmas, shift_mu(image_tokens)) if shift else sigmas).float()


def draw_noise(image_tokens: int, channels: int, seed: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Packed noise [1, image_tokens, channels], drawn on ``device`` in ``dtype``.

    So a seed gives the image that users of kohya-ss/sd-scripts know. ``seed`` None: another image each time.
    """
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.randn(1, image_tokens, channels, generator=generator, device=device, dtype=dtype)


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    progress: bool = False,
) -> Tensor:
    """Follow ``velocity(latents, timesteps [batch])`` from ``noise`` [batch, ...] along ``sigmas``; float32 throughout.

    ``progress`` shows a progress bar.
    """
    from tqdm import tqdm

    latents = noise.float()
    levels = sigmas.tolist()
    for sigma, next_sigma in tqdm(list(pairwise(levels)), desc="denoising", disable=not progress):
        timesteps = torch.full((len(latents),), sigma, dtype=torch.float32, device=latents.device)
        latents = latents + (next_sigma - sigma) * velocity(latents, timesteps).float()
    return latents


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from the unconditional velocity ``scale`` times as far as the conditional one."""
    return unconditional + scale * (conditional - unconditional)
