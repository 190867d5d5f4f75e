"""Frozen blocks of which each process of a machine holds a share: PyTorch's FSDP2, put on a model from outside.

``fully_shard`` gathers a block's weights from all processes when the block works, in the forward pass and again in the
backward pass, and gives them up afterwards; the next block is gathered while one works. What is trained lies beside the
model and is no part of it, so every process has all of that, and there is no gradient to scatter. Between two passes a
weight is only a share: whoever needs whole weights, to merge files or to build a network, does so before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from library.memory.plan import Sharding

GATHERED = 2
"""Whole blocks that a device holds at a time: the one that works, and the next one."""


@dataclass(frozen=True)
class ShardedBlocks:
    """Blocks of these ``sizes`` in bytes, spread over ``processes``."""

    sizes: tuple[int, ...]
    processes: int

    @property
    def bytes(self) -> int:
        """Of all blocks."""
        return sum(self.sizes)

    @property
    def share_bytes(self) -> int:
        """Of the share of one process."""
        return sum(-(-size // self.processes) for size in self.sizes)

    @property
    def gathered_bytes(self) -> int:
        """Of the blocks that are whole at a time."""
        return GATHERED * max(self.sizes, default=0)

    @property
    def freed(self) -> int:
        """Bytes that a device no longer has to hold; below 0 where the blocks are few."""
        return self.bytes - self.share_bytes - self.gathered_bytes


def shard_blocks(model: nn.Module, blocks: Sequence[nn.Module], sharding: Sharding, device: torch.device) -> None:
    """Spread the weights of ``blocks`` over the processes of each machine; their shares lie on ``device``.

    Every process must come here, with the same weights. What else ``model`` has stays whole in every process. Processes
    of one machine have consecutive ranks; machines share nothing, since frozen weights need not be kept in step.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (get_world_size() // sharding.processes, sharding.processes)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("machine", "share"))["share"]
    spread = {parameter for block in blocks for parameter in block.parameters() if parameter.dim() > 0}
    whole = set(model.parameters()) - spread
    # Nobody works in place on what a model returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=sharding.frees_after_forward, ignored_params=whole)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory of tensors in this process: of a weight that is spread, that of its share."""
    from torch.distributed.tensor import DTensor

    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in own)
