"""What an image begins with: noise of unit variance, which may hold coarser grids or be shifted as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from library.randomness import pyramid_layers

PYRAMID_LAYERS = 6


Perturbation = tuple[float, float, float]
"""What happens to an image's start noise: with which probability (0..1), and from where to where by how much."""


def draw_start(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    pyramid: Perturbation | None = None,
    offset: Perturbation | None = None,
    skipped: int | None = None,
) -> Tensor:
    """The noise [C, h, w] = ``shape`` that one image begins with, from its generator.

    Drawn in the order of kohya-ss/sd-scripts: the noise, what makes pyramid noise of it, the offset. For an image that
    is drawn over, ``skipped`` noises of the steps follow, and then the one that counts.
    """
    noise = torch.randn(shape, generator=generator)
    if pyramid is not None and _uniform(generator) < pyramid[0]:
        _, least, largest = pyramid
        discount = least + (largest - least) * _uniform(generator)
        noise = noise + pyramid_layers(shape, PYRAMID_LAYERS, discount, generator)
        noise = noise / noise.std()
    if offset is not None and _uniform(generator) < offset[0]:
        _, least, largest = offset
        noise = noise + least + (largest - least) * torch.randn(1, generator=generator).item()
    if skipped is None:
        return noise
    for _ in range(skipped):
        torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand(1, generator=generator).item()
