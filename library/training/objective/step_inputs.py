"""What one training step works on, whichever model family it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ItemDraws:
    """Where the random draws of a batch come from: one generator for each item and purpose."""

    seed: int
    epoch: int
    item_ids: list[int]
    noise_device: torch.device | str = "cpu"
    """Where noise is drawn: the same numbers on every kind of device only if it is the CPU."""

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One CPU generator for each item."""
        return [generator(self.seed, purpose, self.epoch, item) for item in self.item_ids]

    def noise_generators(self, purpose: str) -> list[torch.Generator]:
        """One generator for each item on ``noise_device``, for what is as large as the latents."""
        return [generator(self.seed, purpose, self.epoch, item, device=self.noise_device) for item in self.item_ids]


@dataclass
class NoisyInput:
    """What a family makes of clean latents for one training step; all float32, batch first."""

    latents: Tensor
    """The model's input, [batch, channels, height, width]."""
    sigmas: Tensor
    """Noise level (timestep / 1000) in 0..1, [batch]."""
    target: Tensor
    """What the prediction is compared with."""
    weights: Tensor
    """Loss weight of each item, [batch]."""
    noise_to_signal: Tensor
    """Noise over signal amplitude at each item's noise level, [batch]; may be infinite."""
