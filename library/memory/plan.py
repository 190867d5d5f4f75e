"""What is done to a model, block by block, to make it fit or run faster. ``library/memory/apply.py`` does it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Streaming:
    """Blocks whose weights wait in host memory and come to the device when they work."""

    places: tuple[tuple[str, int], ...]
    """(list of blocks, index in it), in the order in which they run."""
    slots: int = 2
    """Blocks that the device has memory for at a time."""
    pinned: bool = True
    """Whether the host memory is pinned, if the system allows it."""


@dataclass(frozen=True)
class Sharding:
    """Blocks of which each process of a machine holds a share."""

    processes: int
    """Of one machine: the number of shares."""
    frees_after_forward: bool = True
    """Whether the forward pass gives a gathered block up, which the backward pass then gathers again."""


@dataclass(frozen=True)
class MemoryPlan:
    """By default, nothing is done."""

    checkpointing: bool = False
    """Keep only the inputs of each block for the backward pass, and compute the rest again there."""
    offload_inputs: bool = False
    """With ``checkpointing``: keep those inputs in system RAM."""
    keep_attention: bool = False
    """With ``checkpointing``: keep the outputs of attention too."""
    compiler: str | None = None
    """The backend of ``torch.compile`` that compiles each block when it is first called; None compiles nothing."""
    dynamic: bool | None = None
    """Whether what is compiled serves all sizes of images; False: each is compiled on its own; None: torch decides."""
    streaming: Streaming | None = None
    """Blocks that are streamed, if any."""
    sharding: Sharding | None = None
    """How blocks are spread over processes, if they are; they stay whole until ``AppliedPlan.shard``."""
