"""A memory plan put on a model's blocks from outside, and taken off again: the model knows nothing of it.

A block is a module that gets every tensor that it needs as an argument. Its ``forward`` is replaced on the instance, as
LoRA modules do with layers; so it works with any model, also one of a library, and no module, parameter or name
changes. Around the block's own forward lie, from inside to outside: compilation, streaming, checkpointing, sharding; so
streaming stays out of compiled code and also serves a block that is computed again, and a block is gathered once for
its whole backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from library.memory.activations import OffloadedInputs
from library.memory.checkpointing import checkpointed
from library.memory.compiling import compiled_forwards
from library.memory.plan import MemoryPlan
from library.memory.sharding import shard_blocks
from library.memory.streaming import BlockStream


class AppliedPlan:
    """A plan that is in force until ``remove`` is called, or to the end of a ``with`` statement."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.replaced: list[tuple[nn.Module, Callable[..., Any], Any]] = []
        """Each block, its forward now, and the one of the instance before (None: it had only that of its class)."""
        self.stream: BlockStream | None = None
        """The streamed blocks, if there are any."""
        self.offloaded: OffloadedInputs | None = None
        """The inputs that wait in system RAM, if they do."""

    def replace(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        """Give ``block`` another forward until ``remove``."""
        self.replaced.append((block, forward, vars(block).get("forward")))
        block.forward = forward  # type: ignore[method-assign]

    def rest(self) -> None:
        """Between passes: let streamed weights be where they can be read and changed, and free what they took."""
        if self.stream is not None:
            self.stream.rest()

    def shard(self, model: nn.Module, block_lists: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        """Spread the weights of ``model``'s blocks over processes, if the plan says so, once nobody needs them whole.

        It cannot be undone; ``model`` is thrown away as it is.
        """
        if self.plan.sharding is not None:
            shard_blocks(
                model, [block for blocks in block_lists.values() for block in blocks], self.plan.sharding, device
            )

    def remove(self) -> None:
        """Let the blocks be as they were. Raises RuntimeError when a later plan is still in force."""
        if any(vars(block).get("forward") is not forward for block, forward, _ in self.replaced):
            raise RuntimeError("a block's forward was replaced after this plan was applied")
        for block, _, before in reversed(self.replaced):
            if before is None:
                del block.forward  # the class's own forward shows again
            else:
                block.forward = before  # type: ignore[method-assign]
        self.replaced.clear()
        if self.stream is not None:
            self.stream.remove()
            self.stream = None

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply_memory_plan(
    block_lists: Mapping[str, Sequence[nn.Module]], plan: MemoryPlan, device: torch.device | str = "cpu"
) -> AppliedPlan:
    """Put ``plan`` on the blocks, list by list as ``Pipeline.block_lists`` gives them.

    Streamed blocks work on ``device``. Raises ValueError when their weights are trained.
    """
    blocks = [block for blocks in block_lists.values() for block in blocks]
    forwards = [block.forward for block in blocks]
    if plan.compiler is not None:
        forwards = compiled_forwards(blocks, plan.compiler, plan.dynamic)
    applied = AppliedPlan(plan)
    if plan.streaming is not None:
        streamed = [block_lists[name][index] for name, index in plan.streaming.places]
        stream = BlockStream(streamed, torch.device(device), plan.streaming.slots, plan.streaming.pinned)
        applied.stream = stream
        ranks = {id(block): rank for rank, block in enumerate(streamed)}
        forwards = [
            stream.streamed(ranks[id(block)], forward) if id(block) in ranks else forward
            for block, forward in zip(blocks, forwards)
        ]
    if plan.checkpointing:
        applied.offloaded = OffloadedInputs() if plan.offload_inputs else None
        forwards = [checkpointed(forward, applied.offloaded, plan.keep_attention) for forward in forwards]
    for block, forward in zip(blocks, forwards):
        if forward != block.forward:
            applied.replace(block, forward)
    return applied
