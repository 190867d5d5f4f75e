"""A simulation of one block of each kind finds the very peak that a simulation of every block finds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.memory.simulation import Peak, PeakMemory
from library.training.plan.equal_blocks import NotRepeatable, each_kind_once

WIDTH = 8


class Adapted(nn.Linear):
    """A frozen layer whose forward a trained module replaces, as networks do it."""

    def adapt(self, rank: int) -> Adapter:
        self.weight.requires_grad_(False)
        adapter = Adapter(self, rank)
        self.forward = adapter.forward
        return adapter


class Adapter(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.below = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.below(x) + self.up(self.down(x))


class Block(nn.Module):
    """Two streams and a vector that every block gets; one output is the other's neighbour in memory."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Adapted(WIDTH, 4 * WIDTH, bias=False), Adapted(4 * WIDTH, WIDTH, bias=False)
        self.kept: list[Tensor] | None = None

    def forward(self, one: Tensor, other: Tensor, vector: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        Block.calls += 1
        hidden = F.gelu(self.inner(torch.cat((one, other), dim=1) * vector[:, None]))
        if self.kept is not None:
            self.kept.append(hidden.detach() + 1)
        out = scale * self.outer(hidden)
        return one + out[:, : one.shape[1]], out[:, one.shape[1] :].sigmoid() * other


def peaks(ranks: Iterable[int], plan: MemoryPlan, prepare: Any = None, grad: bool = True) -> tuple[Peak, Peak, int]:
    """Of every block, of each kind once, and how many blocks were really run for the latter."""
    with FakeTensorMode():
        blocks = [Block() for _ in ranks]
        adapters = [layer.adapt(rank) for block, rank in zip(blocks, ranks) for layer in (block.inner, block.outer)]
        if prepare is not None:
            prepare(blocks)
        trained = [parameter for adapter in adapters for parameter in adapter.parameters()]
        applied = apply_memory_plan({"blocks": blocks}, plan)
        found = []
        for equal in (False, True):
            Block.calls = 0
            memory = PeakMemory([*blocks, *adapters])
            with memory, torch.set_grad_enabled(grad), each_kind_once(blocks * equal, applied, memory, trained):
                one, other = torch.rand(2, 5, WIDTH), torch.rand(2, 3, WIDTH)
                shared, first = torch.rand(2, WIDTH, requires_grad=True) * 2, one
                for block in blocks:
                    one, other = block(one, other, shared, scale=0.5)
                end = torch.cat((one, other, first), dim=1).square().mean()
                if grad:
                    end.backward()
            for parameter in trained:
                parameter.grad = None
            found.append(memory.peak)
        return found[0], found[1], Block.calls


CHECKPOINTED = MemoryPlan(checkpointing=True)


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        pytest.param(ranks, plan, id=f"{count}-{kind}", marks=[] if ordinary else [pytest.mark.thorough])
        for count, ranks in (("one rank", (2, 2, 2, 2, 2, 2, 2, 2, 2)), ("two ranks", (2, 2, 7, 7, 2)))
        for kind, plan in (("kept", MemoryPlan()), ("checkpointed", CHECKPOINTED))
        for ordinary in [(count == "one rank") == plan.checkpointing]
    ],
)
def test_the_peak_is_the_same_to_the_byte(ranks, plan):
    every, once, calls = peaks(ranks, plan)
    assert every == once and every.device > 0
    # The first block's inputs and the last one's gradients are of another kind, each with a pass of its own.
    assert calls < (2 if plan.checkpointing else 1) * len(ranks) or len(set(ranks)) > 1


def test_without_gradients_a_kind_is_run_once():
    every, once, calls = peaks((2, 2, 2, 2), MemoryPlan(), grad=False)
    assert (once, calls) == (every, 1)


def test_blocks_that_may_do_anything_are_all_run():
    def hook(blocks: list[Block]) -> None:
        for block in blocks:
            block.inner.register_forward_hook(lambda module, inputs, output: output * 2)

    every, once, calls = peaks((2, 2, 2), MemoryPlan(), hook)
    assert (once, calls) == (every, 3)


def keep(blocks: list[Block]) -> None:
    kept: list[Tensor] = []
    for block in blocks:
        block.kept = kept


def test_what_a_block_leaves_behind_is_noticed():
    with pytest.raises(NotRepeatable):
        peaks((2, 2, 2), MemoryPlan(), keep)
    every, once, _ = peaks((2, 2, 2), MemoryPlan(), keep, grad=False)
    assert once.device >= every.device


def test_inputs_in_system_ram_depend_on_the_blocks_before():
    every, once, calls = peaks((2, 2, 2), MemoryPlan(checkpointing=True, offload_inputs=True))
    assert (once, calls) == (every, 6)
