"""Running a run's own code with tensors that have shapes and dtypes but no values and no memory.

With it the length of a run, the size of its network and its memory are found before anything heavy is loaded: not by
formulas beside the code, but by the code. It rests on torch's FakeTensorMode, which torch.compile is built on.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from library.memory.quick_fakes import DEVICE, MISSING, QuickFakeMode

__all__ = [
    "DataDependentOutputException",
    "Effort",
    "Peak",
    "PeakMemory",
    "Simulation",
    "forget_values",
    "module_bytes",
]

FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
MAKE_NOTHING = frozenset("empty empty_like empty_strided new_empty new_empty_strided".split())
"""Operations that make a tensor without writing it."""


def _attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_on_cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS: dict[Any, Any] = {
    **flop_registry,
    FLASH_ON_CPU: _attention_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_on_cpu_backward,
}
"""How many products and sums an operation takes; torch's own table lacks attention on the CPU."""
PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1}
"""Products of two matrices, and the place of the first one among the arguments."""

Bytes = tuple[int, int]
"""On the device where the work is done, and in system RAM beside another device."""


class Simulation:
    """A pipeline whose parts are loaded without reading their files, as tensors that take no memory.

    Code that needs a tensor's values (``item()``, ``if tensor:``) raises DataDependentOutputException.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.sources = [getattr(pipeline.files, part).source for part in pipeline.parts]
        self._mode = QuickFakeMode()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it is active, every new tensor is one without values. May be entered again.

        Nothing is compiled, streamed or spread over processes.
        """
        plans = self.pipeline.plans
        self.pipeline.plans = {
            part: replace(plan, compiler=None, streaming=None, sharding=None) for part, plan in plans.items()
        }
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
class Effort:
    """What work costs beside memory, counted and not measured."""

    flops: int = 0
    """Of matrix products, convolutions and attention."""
    bytes: int = 0
    """Of the tensors that all other operations write."""
    operations: int = 0
    """Operations that make tensors."""
    product: tuple[int, int, int] | None = None
    """Rows, inner dimension and columns of the largest product of two matrices."""

    def __add__(self, other: Effort) -> Effort:
        largest = max(self.product or (0, 0, 0), other.product or (0, 0, 0), key=lambda sides: math.prod(sides))
        return Effort(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.operations + other.operations,
            largest if any(largest) else None,
        )

    def __sub__(self, earlier: Effort) -> Effort:
        """What came after ``earlier``."""
        return Effort(
            self.flops - earlier.flops, self.bytes - earlier.bytes, self.operations - earlier.operations, self.product
        )


@dataclass(frozen=True)
class Peak:
    """The most bytes that work takes at once."""

    device: int
    host: int = 0
    """In system RAM, by work on another device."""
    forward_flops: int = 0
    """Of a training step's forward pass: of its matrix products, convolutions and attention."""
    effort: Effort = Effort()
    """Of all of it."""


@dataclass(frozen=True)
class Stretch:
    """A part of a course: the most bytes and those at its end, relative to its beginning; then ``then`` is given up."""

    most: Bytes
    net: Bytes
    then: Any = None


class Course:
    """The memory of work that is done apart, moment by moment, without what the work is given."""

    def __init__(self) -> None:
        self.effort = Effort()
        self.given: dict[int, Any] = {}
        """The names of what is given and still held by somebody, by the address of its storage."""
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._level, self._start, self._most = [0, 0], [0, 0], [0, 0]
        self._stretches: list[Stretch] = []

    @property
    def level(self) -> Bytes:
        """The bytes that are taken now."""
        return self._level[0], self._level[1]

    def give(self, tensor: Tensor, name: Any) -> None:
        """Let a new tensor count as given to the work. The first one in a storage names it."""
        key = tensor.untyped_storage()._cdata
        if key not in self.given and key in self._sizes:
            size, on_host = self._sizes[key]
            self.given[key] = name
            self._level[on_host] -= size

    def begin(self) -> None:
        """What follows is written down."""
        self._stretches, self._start, self._most = [], self._level[:], self._level[:]

    def end(self) -> tuple[Stretch, ...]:
        """What happened since ``begin``."""
        self._close(None)
        return tuple(self._stretches)

    def make(self, key: int, size: int, on_host: bool) -> None:
        """A storage is made."""
        self._sizes[key] = (size, on_host)
        self._level[on_host] += size
        self._most[on_host] = max(self._most[on_host], self._level[on_host])

    def forget(self, key: int) -> None:
        """A storage is freed."""
        size, on_host = self._sizes.pop(key)
        if key in self.given:
            self._close(self.given.pop(key))
        else:
            self._level[on_host] -= size

    def _close(self, then: Any) -> None:
        most, net = ((now[0] - self._start[0], now[1] - self._start[1]) for now in (self._most, self._level))
        self._stretches.append(Stretch(most, net, then))
        self._start, self._most = self._level[:], self._level[:]


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
        self.effort = Effort()
        self._known: set[int] = set()
        """The addresses of all storages."""
        self._course: Course | None = None
        self._mode: QuickFakeMode | None = None
        """What makes the tensors, where it can be asked without a detour through torch."""
        for entry in there:
            for tensor in [entry] if isinstance(entry, Tensor) else [*entry.parameters(), *entry.buffers()]:
                self._note(tensor, counts=False)

    def __enter__(self) -> PeakMemory:
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        self._mode = mode if isinstance(mode, QuickFakeMode) else None
        return super().__enter__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a simulation, and to say so takes as long as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = MISSING if self._mode is None else self._mode.quick(func, args, kwargs)[0]
        if func is DEVICE and result is not MISSING:
            return result
        if result is MISSING:
            result = func(*args, **(kwargs or {}))
        made = 0
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                made += self._note(leaf)
        self._count(func._overloadpacket, made, result, args, kwargs or {})
        return result

    def _count(self, packet: Any, made: int, result: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Add an operation that has made ``made`` bytes to the effort."""
        effort, first = self.effort, PRODUCTS.get(packet)
        if first is not None:  # torch's formula looks for tensors in all that it is given
            rows, inner = args[first].shape
            columns = args[first + 1].shape[1]
            self.effort = effort + Effort(2 * rows * inner * columns, 0, 1, (rows, inner, columns))
        elif packet in FLOPS:
            self.effort = effort + Effort(FLOPS[packet](*args, **kwargs, out_val=result), 0, 1)
        elif made and packet.__name__ not in MAKE_NOTHING:
            self.effort = Effort(effort.flops, effort.bytes + made, effort.operations + 1, effort.product)

    @contextlib.contextmanager
    def apart(self, course: Course) -> Iterator[None]:
        """What is made meanwhile is counted by ``course`` instead, for as long as it exists."""
        outer, effort = self._course, self.effort
        self._course, self.effort = course, course.effort
        try:
            yield
        finally:
            course.effort = self.effort
            self._course, self.effort = outer, effort

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in system RAM, beside another device."""
        return self._has_host and tensor.device.type == "cpu"

    def happen(self, stretch: Stretch) -> None:
        """A part of a course takes place."""
        device, host = self.live + stretch.most[0], self.live_on_host + stretch.most[1]
        if device > self.peak.device or host > self.peak.host:
            self.peak = Peak(max(self.peak.device, device), max(self.peak.host, host))
        self.add_bytes(stretch.net)

    def add_bytes(self, count: Bytes) -> None:
        """Bytes that no tensor shows are taken, or (below 0) given back."""
        self.live += count[0]
        self.live_on_host += count[1]

    def _note(self, tensor: Tensor, counts: bool = True) -> int:
        """Count a tensor's memory if it is new; returns its bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return 0
        self._known.add(key)
        size, on_host, course = storage.nbytes() if counts else 0, self.is_on_host(tensor), self._course
        weakref.finalize(storage, self._forget, key, size, on_host, course)
        if course is not None:
            course.make(key, size, on_host)
        else:
            self._add(size, on_host)
        return size

    def _forget(self, key: int, size: int, on_host: bool, course: Course | None) -> None:
        self._known.discard(key)
        if course is not None:
            course.forget(key)
        else:
            self._add(-size, on_host)

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
