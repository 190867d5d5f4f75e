"""The exponential moving average of the trained weights (``--ema_decay``): samples, validation and a file use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    import torch

BYTES_PER_VALUE = 4
"""The average is in float32, whatever the weights are in."""


def check_decay(decay: float | None) -> None:
    """Raises UserError for a decay with which nothing would be averaged, or nothing learned."""
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"--ema_decay must be above 0 and below 1, such as 0.999, not {decay:g}.")


def decay_of_update(decay: float, number: int) -> float:
    """The decay of the ``number``-th update (from 1): a short run is not an average of weights that are untrained."""
    return min(decay, (1 + number) / (10 + number))


class MovingAverage:
    """Averages of parameters, which begin as their values.

    With the decay d of an update, average <- d * average + (1 - d) * parameter.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.begin()

    def begin(self) -> None:
        """Take the present parameters as the average of no update."""
        self.values = [parameter.detach().float().clone() for parameter in self.parameters]
        self.updates = 0

    def update(self) -> None:
        """Take the parameters in, as they are after an optimizer step."""
        import torch

        self.updates += 1
        weights = [parameter.detach().float() for parameter in self.parameters]
        torch._foreach_lerp_(self.values, weights, 1 - decay_of_update(self.decay, self.updates))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters have the average's values; their own come back to the bit."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._fill(self.values)
            yield
        finally:
            self._fill(kept)

    def _fill(self, values: Sequence[torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self.parameters, values):
                parameter.copy_(value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by the number of their parameter, for a state."""
        return {f"{number:06d}": value for number, value in enumerate(self.values)}

    def restore(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Continue from what ``tensors()`` and ``updates`` were. Raises KeyError or RuntimeError if they do not fit."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.updates = updates
