"""Where a run stands, and what became of it so far."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace

from library.training.loss_record import LossRecord
from library.training.output.state import Position


@dataclass
class Progress:
    """The part of a run that changes with every step."""

    position: Position = field(default_factory=Position)
    resumable: Position | None = None
    """The end of the last step, as long as network and optimizer stand there."""
    first_step: int = 0
    """Steps that were done before this process began to train."""
    has_updated: bool = False
    """Whether this process has updated the network."""
    left_out: int = 0
    """Steps without their update, because a loss or a gradient was not finite; those before a resume among them."""
    images: int = 0
    """Images that all processes of this run have trained on, repeats counted."""
    record: LossRecord = field(default_factory=LossRecord)
    validation_losses: dict[str, float] = field(default_factory=dict)
    """The last validation losses by name."""
    ended_by: str | None = None
    """What ended the run before its last step."""
    session_id: int = field(default_factory=lambda: secrets.randbits(32))
    """Shared by a run and the runs that resume it; so is ``started_at``."""
    started_at: float = field(default_factory=time.time)
    """Seconds since 1970."""
    process_started_at: float = field(default_factory=time.time)

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.position.step

    def mark_resumable(self) -> None:
        """Network and optimizer stand at the present position."""
        self.resumable = replace(self.position)
