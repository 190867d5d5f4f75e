"""Where the time and the memory of a run go."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Entry = TypeVar("Entry")
Result = TypeVar("Result")

OTHER = "other"


class RunClock:
    """Seconds that a run spends on each kind of work.

    Every moment belongs to exactly one part: the innermost that is open, or ``other``. On an accelerator work goes on
    while Python is ahead of it; a part gets the time in which Python is in it or waits in it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._open = [OTHER]
        self._mark = now()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of the block belongs to ``name``, but for parts that are opened inside it."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def each(self, name: str, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries; the time that they are waited for belongs to ``name``."""
        iterator = iter(entries)
        while True:
            with self.part(name):
                try:
                    entry = next(iterator)
                except StopIteration:
                    return
            yield entry

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each part so far."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now


def timed(part: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Give the time of a method to ``part`` of its object's ``clock``, a ``RunClock``."""

    def decorate(method: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **named: Any) -> Result:
            with self.clock.part(part):
                return method(self, *arguments, **named)

        return call

    return decorate


def peak_process_memory() -> int:
    """The most memory in bytes that this process has held at once (pages of mapped files in memory included)."""
    try:
        # Not ru_maxrss: on Linux a new process starts with that of the one which started it.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def process_memory() -> int:
    """The memory in bytes that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_device_memory() -> int | None:
    """The most memory in bytes that tensors of this process have taken on the CUDA device; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
