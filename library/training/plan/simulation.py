"""Running a run's own code with tensors that have shapes and dtypes but no values and no memory.

With it the length of a run, the size of its network and its memory are found before anything heavy is loaded: not by
formulas beside the code, but by the code. It rests on torch's FakeTensorMode, which torch.compile is built on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["DataDependentOutputException", "Peak", "PeakMemory", "Simulation", "forget_values", "module_bytes"]


class Simulation:
    """A pipeline whose parts are loaded without reading their files, as tensors that take no memory.

    What asks for a tensor's numbers (``item()``, ``if tensor:``) raises DataDependentOutputException.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.sources = [getattr(pipeline.files, part).source for part in pipeline.parts]
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it is active, every new tensor is one without values. May be entered again.

        Nothing is compiled or streamed.
        """
        plans = self.pipeline.plans
        self.pipeline.plans = {part: replace(plan, compiler=None, streaming=None) for part, plan in plans.items()}
        for source in self.sources:
            source.reads_values = False
        try:
            with self._mode:
                yield
        finally:
            self.pipeline.plans = plans
            for source in self.sources:
                source.reads_values = True


def forget_values(module: nn.Module) -> None:
    """Replace a module's parameters by ones without values. To be called inside a ``Simulation``."""
    replaced = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
        for parameter in module.parameters()
    }
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = replaced[id(parameter)]


@dataclass(frozen=True)
class Peak:
    """The most bytes that work takes at once."""

    device: int
    host: int = 0
    """In system RAM, by work on another device."""
    forward_flops: int = 0
    """Of a training step's forward pass: of its matrix products and convolutions."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once, above those that were there before.

    Tensors count from the operation that makes them until nobody holds them, as with an allocator that never wastes
    anything; what a kernel needs inside it is not seen. To be used inside a ``Simulation``.
    """

    def __init__(self, there: Iterable[nn.Module | Tensor] = (), device: torch.device | None = None) -> None:
        """``there``: modules and tensors that do not count; ``device``: where the work is done (None: anywhere)."""
        super().__init__()
        self._has_host = device is not None and device.type != "cpu"
        self.live = self.live_on_host = 0
        self.peak = Peak(0)
        self.flops = 0
        """Of matrix products and convolutions."""
        self._sizes: dict[int, int] = {}
        for entry in there:
            for tensor in [entry] if isinstance(entry, Tensor) else [*entry.parameters(), *entry.buffers()]:
                self._note(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if counts else 0
        on_host = self._has_host and tensor.device.type == "cpu"
        weakref.finalize(storage, self._forget, key, on_host)
        self._add(self._sizes[key], on_host)

    def _forget(self, key: int, on_host: bool) -> None:
        self._add(-self._sizes.pop(key, 0), on_host)

    def _add(self, size: int, on_host: bool) -> None:
        if on_host:
            self.live_on_host += size
        else:
            self.live += size
        if size > 0 and (self.live > self.peak.device or self.live_on_host > self.peak.host):
            self.peak = Peak(max(self.peak.device, self.live), max(self.peak.host, self.live_on_host))


def module_bytes(module: nn.Module) -> int:
    """The memory of a module's parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
