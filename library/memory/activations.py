"""The inputs of checkpointed blocks in system RAM instead of on the device, copied while the device computes.

In the forward pass a block's input is copied out on a stream of its own, and its memory is free once the block is done.
In the backward pass the input of the block before is on its way back while a block computes. The host's memory is
pinned and used again and again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.console import warn

AHEAD = 2
"""Tensors on their way back beside the one in use: as many as a block has inputs."""


class Kept:
    """A tensor that waits in host memory."""

    def __init__(self, tensor: Tensor, memory: Tensor, before: Kept | None) -> None:
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self.memory = memory
        """Bytes, at least as many as the tensor has."""
        self.host = memory[: tensor.nbytes].view(tensor.dtype).as_strided(self.shape, self.stride)
        self.before: Callable[[], Kept | None] = (lambda: None) if before is None else weakref.ref(before)
        """What was kept before it, which the backward pass needs after it, if it is still there."""
        self.returned: Tensor | None = None
        """On the device, or on its way there."""
        self.is_taken = False
        self.stream: Any = None
        """The one that it comes back on."""

    def __del__(self) -> None:
        if self.returned is not None and self.stream is not None:  # sent for, but the pass has ended early
            self.returned.record_stream(self.stream)


class OffloadedInputs:
    """Host memory for the inputs of a model's blocks."""

    smallest: ClassVar[int] = 1 << 20
    """Bytes from which a tensor is worth the way."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.newest: weakref.ref[Kept] | None = None
        self.bytes_out = self.bytes_in = self.late = 0
        """Copied so far. Late are tensors that were needed before they had been sent for: the last of each pass."""
        self._stream: Any = None
        self._is_unpinned = False

    def around(self, inputs: Iterable[Any]) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which the large tensors among ``inputs`` that need a gradient are saved in host memory."""
        worth = {
            _place(value)
            for value in inputs
            if isinstance(value, Tensor) and value.requires_grad and value.nbytes >= self.smallest and _is_dense(value)
        }

        def pack(tensor: Tensor) -> Tensor | Kept:
            return self.send_away(tensor) if _place(tensor) in worth else tensor

        def unpack(kept: Tensor | Kept) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.take_back(kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def send_away(self, tensor: Tensor) -> Kept:
        """Copy a tensor to host memory; its own may be given up at once."""
        kept = Kept(tensor, self._memory(tensor), None if self.newest is None else self.newest())
        self.newest = weakref.ref(kept)
        weakref.finalize(kept, self.free.append, kept.memory).atexit = False
        self.bytes_out += tensor.nbytes
        if tensor.is_cuda:
            stream = self._side_stream(tensor.device)
            with torch.cuda.stream(stream):
                kept.host.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(stream)
        else:
            kept.host.copy_(tensor.detach())
        return kept

    def take_back(self, kept: Kept) -> Tensor:
        """The tensor on its device, for what is queued on the device from now on; those before it are sent for."""
        self.late += kept.returned is None
        self._send_for(kept)
        tensor, kept.returned = kept.returned, None
        assert tensor is not None
        if tensor.is_cuda:
            torch.cuda.current_stream(kept.device).wait_stream(self._stream)
        kept.is_taken = True
        before, ahead = kept.before(), 0
        while before is not None and ahead < AHEAD:
            if not before.is_taken:
                self._send_for(before)
                ahead += 1
            before = before.before()
        return tensor

    def _send_for(self, kept: Kept) -> None:
        if kept.returned is not None:
            return
        kept.returned = torch.empty_strided(kept.shape, kept.stride, dtype=kept.dtype, device=kept.device)
        self.bytes_in += kept.host.nbytes
        if kept.returned.is_cuda:
            kept.stream = self._side_stream(kept.device)
            with torch.cuda.stream(kept.stream):
                kept.returned.copy_(kept.host, non_blocking=True)
        else:
            kept.returned.copy_(kept.host)

    def _side_stream(self, device: torch.device) -> Any:
        """The copies' stream, after all that the device was told to do before."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream

    def _memory(self, tensor: Tensor) -> Tensor:
        """Free host memory of at least the tensor's size, new only where there is none."""
        fitting = [index for index, memory in enumerate(self.free) if memory.nbytes >= tensor.nbytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda index: self.free[index].nbytes))
        if self.free:  # all too small: images have become larger
            self.free.pop()
        if tensor.is_cuda and not self._is_unpinned:
            try:
                return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._is_unpinned = True
                warn("the system doesn't pin that much memory: the computation waits for each offloaded input")
        return torch.empty(tensor.nbytes, dtype=torch.uint8)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, in whatever order: then it can come back as it was, strides and all."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.numel() == last + 1


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's first number is: the same for two tensors on the same memory, also in a simulation."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
