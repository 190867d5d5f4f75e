"""The average loss that a run reports: the mean over the last epoch's batches, as far as they were seen."""

from __future__ import annotations

import math
from typing import Any


class LossRecord:
    """One loss for each micro-batch of an epoch; the newest value of each counts."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def add(self, batch: int, loss: float) -> None:
        """Note the loss of micro-batch ``batch`` of an epoch; one that is not finite leaves the older one."""
        if math.isfinite(loss):
            self.losses[batch] = loss

    @property
    def average(self) -> float:
        """The mean of the newest losses; 0 before the first."""
        if not self.losses:
            return 0.0
        return math.fsum(self.losses.values()) / len(self.losses)

    def state(self) -> Any:
        """JSON-able contents."""
        return [[batch, loss] for batch, loss in self.losses.items()]

    def load_state(self, state: Any) -> None:
        """Take over what ``state`` returned."""
        self.losses = {batch: loss for batch, loss in state}
