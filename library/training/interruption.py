"""Ctrl-C and SIGTERM end a run after the step in hand; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from library.console import raise_swallowed_interrupt, warn

PASSED_ON = 2.0
"""Seconds in which a launcher passes a signal on."""


class Interruption:
    """Notes a wish to end. Use as a context manager around the loop; the former handlers come back after it.

    Under ``accelerate launch`` the end of the launcher counts as a wish too, because a signal to the launcher does not
    reach the process that trains.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._noted = 0.0
        """When the first wish came."""
        self._handlers: dict[int, Any] = {}
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.name != "nt"
        self._launcher = os.getppid() if launched else None

    def __enter__(self) -> Interruption:
        raise_swallowed_interrupt()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        passed_on = self.reason is not None and self._is_passed_on()
        for number, handler in self._handlers.items():
            signal.signal(number, self._after if passed_on else handler)

    def _after(self, number: int, frame: FrameType | None) -> None:
        """A signal after the loop, which was quicker than the launcher, is still the one that has been obeyed."""
        if not self._is_passed_on():
            for each, handler in self._handlers.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and self._is_passed_on():
            return
        if self.reason is not None and number == signal.SIGINT:
            former = self._handlers[number]
            if callable(former):
                former(number, frame)
            raise KeyboardInterrupt
        self._noted = time.monotonic()
        self.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        warn(f"{self.reason}: the run ends after this step. Ctrl-C once more ends it at once.")

    def _is_passed_on(self) -> bool:
        """Whether a signal is the launcher's of several processes, who passes on what a terminal has sent to all."""
        return "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._noted < PASSED_ON

    def wished(self, accelerator: Any) -> bool:
        """Whether any process was asked to end; every process gets the same answer."""
        if self._launcher is not None and self.reason is None and os.getppid() != self._launcher:
            self.reason = "the launcher has ended"
        if accelerator.num_processes == 1:
            return self.reason is not None
        import torch

        wish = torch.tensor([float(self.reason is not None)], device=accelerator.device)
        return bool(accelerator.reduce(wish, reduction="sum").item() > 0)
