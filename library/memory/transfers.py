"""Copies between host memory and a device: on a stream of their own where the device has streams, so that they run
beside the computation.

Nothing here makes the program wait for the device but the staged copies of a system that pins no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from library.console import warn

PAGE = 4096
"""Bytes; memory is pinned page by page."""
STAGE = 1 << 26
"""Bytes that go through pinned memory at once where the source is not pinned."""
_PORTABLE = 1
"""cudaHostRegisterPortable: the memory is pinned for every CUDA context of the process."""


def pages(size: int) -> Tensor:
    """``size`` bytes of host memory in pages that hold nothing else: no page can be pinned twice."""
    memory = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + size]


def pin(memory: Tensor) -> bool:
    """Pin memory that ``pages`` gave where it is, without a copy and without rounding its size up; False when refused.

    The tensor must live as long as ``unpin`` has not been called.
    """
    if not torch.cuda.is_available():
        return False
    cudart: Any = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)) == 0:
        return True
    _forget_refusal()
    return False


def _forget_refusal() -> None:
    """CUDA keeps the error of a refused call, and torch would blame the next operation for it."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def unpin(memory: Tensor) -> None:
    """Undo ``pin``, once nothing is copied from that memory any more."""
    torch.cuda.synchronize()
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(memory.data_ptr())


class Copies:
    """Copies to a device without streams, done at once."""

    def start(self, key: int, source: Tensor, target: Tensor) -> None:
        """Begin to copy ``source`` (host) to ``target`` (device), after all that the device was told to do before."""
        target.copy_(source)

    def finish(self, key: int) -> None:
        """Let the device wait for the copy ``key`` before it does what is queued from now on."""


class PinnedCopies(Copies):
    """Copies from pinned memory to a CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)  # for a thread that has a setting of its own
        self.stream = torch.cuda.Stream(device)
        self.ready: dict[int, torch.cuda.Event] = {}

    def start(self, key: int, source: Tensor, target: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._copy(key, source, target)

    def _copy(self, key: int, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.ready[key] = self.stream.record_event()

    def finish(self, key: int) -> None:
        event = self.ready.pop(key, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class StagedCopies(PinnedCopies):
    """Copies from ordinary memory: a thread moves them, piece by piece, into one of two small pinned buffers first.

    ``size``: bytes of the largest copy.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__(device)
        self.staging = [torch.empty(min(size, STAGE), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.emptied: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0
        self.thread = ThreadPoolExecutor(1, "block streaming")
        self.pending: dict[int, Future[None]] = {}

    def start(self, key: int, source: Tensor, target: Tensor) -> None:
        told = torch.cuda.current_stream(self.device).record_event()
        self.pending[key] = self.thread.submit(self._stage, key, source, target, told)

    def _stage(self, key: int, source: Tensor, target: Tensor, told: torch.cuda.Event) -> None:
        torch.cuda.set_device(self.device)  # a thread's own setting
        self.stream.wait_event(told)
        size = self.staging[0].nbytes
        for piece, place in zip(source.split(size), target.split(size)):
            turn, self.turn = self.turn, 1 - self.turn
            emptied = self.emptied[turn]
            if emptied is not None:
                emptied.synchronize()
            self._copy(key, self.staging[turn][: piece.nbytes].copy_(piece), place)
            self.emptied[turn] = self.ready[key]

    def finish(self, key: int) -> None:
        pending = self.pending.pop(key, None)
        if pending is not None:
            pending.result()
        super().finish(key)


def copies_to(device: torch.device, memory: Sequence[Tensor], pinned: bool) -> Copies:
    """The way from these host buffers (bytes) to ``device``.

    With ``pinned`` they are pinned; where the system refuses that, a warning is logged, and ordinary memory is used.
    """
    if device.type != "cuda":
        return Copies()
    if pinned and _pin_all(memory):
        return PinnedCopies(device)
    try:
        return StagedCopies(device, max(buffer.nbytes for buffer in memory))
    except RuntimeError:  # not even that much can be pinned
        warn("the system pins no memory, so the computation waits for every streamed block")
        return Copies()


def _pin_all(memory: Sequence[Tensor]) -> bool:
    for number, buffer in enumerate(memory):
        if not pin(buffer):
            for done in memory[:number]:
                unpin(done)
            warn("the system doesn't pin that much memory: streamed blocks go through two small buffers, more slowly")
            return False
    return True
