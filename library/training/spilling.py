"""Steps that become far slower while the device's memory is full: its driver probably keeps a part in system RAM.

Drivers on Windows do that instead of reporting that memory has run out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

WINDOW = 10
"""Steps whose median time is looked at together."""
SLOWER = 3.0
"""Times the fastest window."""
FULL = 0.95
"""Of the device's memory."""


class SpillWatch:
    """Follows how long steps take. ``used`` gives the share of the device's memory that is taken, 0 to 1."""

    def __init__(self, used: Callable[[], float], now: Callable[[], float] = time.perf_counter) -> None:
        self._used, self._now = used, now
        self._last: float | None = None
        self._times: list[float] = []
        self._fastest: float | None = None
        self._warned = False

    def step(self) -> str | None:
        """A step is done; returns a warning, once, when it seems that memory spills."""
        moment = self._now()
        if self._last is not None:
            self._times.append(moment - self._last)
        self._last = moment
        if self._warned or len(self._times) < WINDOW:
            return None
        median = statistics.median(self._times)
        self._times.clear()
        self._fastest = median if self._fastest is None else min(self._fastest, median)
        if median <= SLOWER * self._fastest or self._used() < FULL:
            return None
        self._warned = True
        return (
            f"a step takes {median:.1f} s, where it took {self._fastest:.1f} s, and the device's memory is full: its "
            "driver probably keeps a part in system RAM; --vram_budget chooses options that need less."
        )


def used_share(device: Any) -> float:
    """The share of a CUDA device's memory that is taken, by any program; 0 for other devices."""
    if device.type != "cuda":
        return 0.0
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total
