"""What a model family is trained to do: the seam between noise, target and loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from library.training.objective.step_inputs import ItemDraws, NoisyInput


class Objective(ABC):
    """How clean latents become a training step's input and target, and how the model's output is compared with them."""

    @abstractmethod
    def noisy_input(self, latents: Tensor, draws: ItemDraws, timestep: int | None = None) -> NoisyInput:
        """Noise, noise levels and targets for clean latents [batch, channels, height, width], float32.

        Each kind of draw has its own generator for each item. ``timestep`` (0..1000) fixes the noise level of all.
        """

    @abstractmethod
    def read_prediction(self, output: Tensor, noisy: NoisyInput) -> Tensor:
        """The model's output for ``noisy`` as it is compared with ``noisy.target``, shaped as ``output``."""
