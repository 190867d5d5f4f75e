"""Inpainting: only a part of an image is repainted, the rest stays as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from library.models.sampling import Solver, Step, StepHook


class Inpainting(StepHook):
    """Keeps the original image where ``mask`` [B or 1, 1, h, w] is 0, and repaints it where it is 1.

    Between the two, both are mixed. At each step, what is kept has as much noise as what is drawn.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask
        self.drawing: Any = None

    def solver(self, solver: Solver) -> Solver:
        """The same one, which knows the image and its noise."""
        self.drawing = solver
        return solver

    def after(self, latents: Tensor, step: Step) -> Tensor:
        """With the image in its place."""
        kept = self.drawing.noisy_image(step.index + 1)
        mask = self.mask.to(latents)
        if mask.shape[-2:] != latents.shape[-2:]:  # an image that grows while it is drawn
            mask = interpolate(mask, size=latents.shape[-2:], mode="bilinear", align_corners=False)
        return kept * (1 - mask) + latents * mask
