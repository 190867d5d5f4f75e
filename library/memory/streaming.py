"""Frozen blocks that live in host memory and come to the device shortly before they work.

The weights of a streamed block lie in one flat host buffer. The device has a ring of a few buffers, the slots: the
block of rank r (its place among the streamed ones, in the order in which they run) always goes to slot r mod slots.
When a block has worked, the next one for its slot is on its way: r + slots in the forward pass, r - slots in the
backward pass. Weights are only ever copied to the device, never back, since they don't change.

Where a weight isn't on the device, its parameter shows the host's values, so that it can be read, merged into and
saved at any time outside of a pass. Whoever writes to it calls ``rest`` before.

The backward pass is followed by hooks on the tensors that enter and leave a block. They change nothing in the graph,
so gradients are the same to the bit. That a block's work is over when the gradient of its newest input is complete
rests on the order in which autograd works: of the operations that are ready, the one that was recorded last. A weight
that autograd has kept as a view of a slot finds its values there again, because a block always gets the same slot.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.memory.stored_linear import StoredLinear
from library.memory.transfers import Copies, PinnedCopies, StagedCopies, copies_to, pages, unpin

ALIGNMENT = 256
"""Bytes; of each weight in a buffer."""


def streamed_tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The tensors of a block that are streamed, as (module, name): the weights of its Linear layers and convolutions.

    Biases, norms and scales are small and stay on the device.
    """
    for module in block.modules():
        if isinstance(module, StoredLinear):
            yield from ((module, name) for name in module.bulk)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            yield module, "weight"


def streamed_bytes(block: nn.Module) -> int:
    """Bytes of a block's buffer."""
    return sum(aligned(getattr(module, name).nbytes) for module, name in streamed_tensors(block))


def aligned(size: int) -> int:
    """Bytes that a weight of ``size`` bytes takes in a buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_in_backward() -> bool:
    """Whether autograd's backward pass is calling."""
    return torch._C._current_graph_task_id() != -1


class HostBlock:
    """The weights of a block in one host buffer, and where its parameters show at present.

    Raises ValueError for a weight that is trained.
    """

    def __init__(self, block: nn.Module) -> None:
        self.places = list(streamed_tensors(block))
        if any(getattr(module, name).requires_grad for module, name in self.places):
            raise ValueError("only frozen weights can be streamed")
        self.shapes = [(getattr(module, name).shape, getattr(module, name).dtype) for module, name in self.places]
        self.memory = pages(streamed_bytes(block))
        self.home = self.views(self.memory)
        for index, view in enumerate(self.home):  # one weight after another, so that memory never holds a block twice
            module, name = self.places[index]
            view.copy_(getattr(module, name))
            self._show(index, view)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The weights in a buffer laid out like this block's."""
        found, start = [], 0
        for shape, dtype in self.shapes:
            size = shape.numel() * dtype.itemsize
            found.append(memory[start : start + size].view(dtype).view(shape).data)
            start += aligned(size)
        return found

    def show(self, views: Sequence[Tensor]) -> None:
        """Let the block's parameters be these tensors."""
        for index, view in enumerate(views):
            self._show(index, view)

    def _show(self, index: int, view: Tensor) -> None:
        module, name = self.places[index]
        if name in module._parameters:
            module._parameters[name].data = view  # type: ignore[union-attr]
        else:
            module._buffers[name] = view

    def poison(self) -> None:
        """Let the block's parameters be no numbers at all."""
        for index, (shape, dtype) in enumerate(self.shapes):
            nothing = torch.full((), float("nan") if dtype.is_floating_point else 1).to(dtype)
            self._show(index, nothing.expand(shape))


class BlockStream:
    """The streamed blocks of a model, in the order in which they run, and the ring on ``device``."""

    poisons: ClassVar[bool] = False
    """For tests: a weight that has been on the device and isn't now shows NaN, so that none is used in silence."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, slots: int = 2, pinned: bool = True) -> None:
        """``blocks`` are taken over into host memory one after another. Raises ValueError for trained weights."""
        self.device = device
        self.slots = min(slots, len(blocks))
        self.hosts = [HostBlock(block) for block in blocks]
        self.held: list[int | None] = [None] * self.slots
        """The rank that each slot holds or is about to hold."""
        self.ring: list[Tensor] = []
        self.views: list[list[Tensor]] = []
        """Of each rank, its weights in its slot."""
        self.first_trained = 0
        """The lowest rank that the next backward pass reaches."""
        self.loads = self.bytes_moved = self.misses = 0
        """Misses are blocks that were not on their way when they were needed, but for the first of all."""
        memory = [host.memory for host in self.hosts]
        self.copies: Copies = copies_to(device, memory, pinned)
        if type(self.copies) is PinnedCopies:
            for buffer in memory:
                weakref.finalize(buffer, unpin, buffer.detach()).atexit = False
        self._guarded = [module for host in self.hosts for module, _ in host.places]
        for module in self._guarded:
            _leave_streamed_tensors(module)
        for block in blocks:  # what is small may have been loaded together with the rest, as scales are
            block.to(device)

    @property
    def host_bytes(self) -> int:
        """Of the buffers in host memory."""
        return sum(host.memory.nbytes for host in self.hosts)

    @property
    def ring_bytes(self) -> int:
        """Of the slots on the device."""
        return sum(self.slot_sizes)

    @property
    def slot_sizes(self) -> list[int]:
        """Each slot is as large as the largest block that it gets."""
        return slot_sizes([host.memory.nbytes for host in self.hosts], self.slots)

    # ---- passes -----------------------------------------------------------------------------------------------------

    def streamed(self, rank: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of the block of that rank, with its weights on the device while it works."""

        def run(*inputs: Any, **named: Any) -> Any:
            self.require(rank)
            if is_in_backward():  # checkpointing computes the block again
                return forward(*inputs, **named)
            for ahead in range(rank + 1, rank + self.slots):  # there already, unless the last pass ended early
                self._load_if_absent(ahead)
            result = forward(*inputs, **named)
            if torch.is_grad_enabled():
                self._follow_backward(rank, (inputs, named), result)
                self._load_if_absent(rank + self.slots)
            elif rank + 1 == len(self.hosts):
                self.begin()
            else:
                self._load_if_absent(rank + self.slots)
            return result

        return run

    def require(self, rank: int) -> None:
        """Let the block of that rank be on the device for what is queued on the device from now on."""
        if self.held[rank % self.slots] != rank:
            self.misses += any(held is not None for held in self.held)
            self._load_if_absent(rank)
        self.copies.finish(rank)

    def begin(self) -> None:
        """Fetch the first blocks for the next pass."""
        for rank in range(self.slots):
            self._load_if_absent(rank)

    def _follow_backward(self, rank: int, inputs: Any, outputs: Any) -> None:
        """Be told when the backward pass enters and leaves this block."""
        if rank == 0:
            self.first_trained = len(self.hosts)
        leaving = [out for out in tree_leaves(outputs) if isinstance(out, Tensor) and out.requires_grad]
        for out in leaving:
            out.register_hook(lambda grad: self._enter_backward(rank))
        if leaving:
            self.first_trained = min(self.first_trained, rank)
        entering = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.grad_fn is not None]
        if entering:
            newest = max(entering, key=lambda x: x.grad_fn._sequence_nr())  # type: ignore[union-attr]
            newest.register_hook(lambda grad: self._leave_backward(rank))

    def _enter_backward(self, rank: int) -> None:
        self.require(rank)
        if rank == self.first_trained:  # the last that the pass reaches; no hook says when it is done
            torch.autograd.Variable._execution_engine.queue_callback(self.begin)  # type: ignore[attr-defined]

    def _leave_backward(self, rank: int) -> None:
        if rank - self.slots >= self.first_trained:
            self._load_if_absent(rank - self.slots)

    def _load_if_absent(self, rank: int) -> None:
        if not 0 <= rank < len(self.hosts) or self.held[rank % self.slots] == rank:
            return
        if not self.ring:
            self.ring = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in self.slot_sizes]
            self.views = [host.views(self.ring[rank % self.slots]) for rank, host in enumerate(self.hosts)]
        slot = rank % self.slots
        self._vacate(slot)
        memory = self.hosts[rank].memory
        self.copies.start(rank, memory, self.ring[slot][: memory.nbytes])
        self.hosts[rank].show(self.views[rank])
        self.held[slot] = rank
        self.loads += 1
        self.bytes_moved += memory.nbytes

    def _vacate(self, slot: int) -> None:
        held, self.held[slot] = self.held[slot], None
        if held is None:
            return
        self.copies.finish(held)  # one that nobody has used
        if self.poisons:
            self.hosts[held].poison()
        else:
            self.hosts[held].show(self.hosts[held].home)

    # ---- between passes ---------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Give the ring's memory back and let all parameters show the host's values, which may then be changed."""
        for slot in range(self.slots):
            self._vacate(slot)
        for host in self.hosts:
            host.show(host.home)
        self.ring, self.views = [], []

    def remove(self) -> None:
        """End streaming: the weights stay in host memory, in the same buffers."""
        self.rest()
        for module in self._guarded:
            vars(module).pop("_apply", None)
        if isinstance(self.copies, StagedCopies):
            self.copies.thread.shutdown()


def slot_sizes(sizes: Sequence[int], slots: int) -> list[int]:
    """Bytes of each slot of a ring for blocks of these ``sizes``, in the order in which they run."""
    return [max(sizes[slot::slots]) for slot in range(min(slots, len(sizes)))]


def _leave_streamed_tensors(module: nn.Module) -> None:
    """Let ``module.to`` and its like pass over the streamed tensors."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors: list[dict[str, Any]] = [module._parameters, module._buffers]
        names = {name for owner, name in streamed_tensors(module) if owner is module}
        before = [dict(held) for held in tensors]
        for held in tensors:
            for name in names & held.keys():
                del held[name]
        try:
            return type(module)._apply(module, fn, recurse)
        finally:
            for held, own in zip(tensors, before):  # the order in which they are named is kept, too
                moved = {**own, **held}
                held.clear()
                held.update(moved)

    module._apply = apply  # type: ignore[method-assign]
