"""How the Linear weights of a model's blocks are kept in memory, as a description; ``formats`` does what it says."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Granularity = Literal["tensor", "channel", "block"]
"""What shares a scale: a weight, an output channel, or 64 inputs of one."""


@dataclass(frozen=True)
class Storage:
    """A storage format of weights."""

    kind: Literal["fp8", "int8", "nf4"]
    """``fp8``: 8-bit floats (e4m3fn); ``int8``: 8-bit integers; ``nf4``: 4-bit normal floats of bitsandbytes."""
    granularity: Granularity = "tensor"
    """Of fp8. The others have their own: int8 a scale for each output channel, nf4 one for 64 weights."""
    fast: bool = False
    """Of fp8: products are in fp8 too, of which only scales for tensors and channels allow."""

    @property
    def label(self) -> str:
        """Words that tell it from every other, as they stand in the identity of caches."""
        if self.kind != "fp8":
            return f"in {self.kind}"
        return "in 8 bits" if self.granularity == "tensor" else f"in 8 bits by {self.granularity}"


FP8_BY_TENSOR = Storage("fp8")


@dataclass(frozen=True)
class BlocksStoredAs:
    """A dtype for a whole model: the Linear weights of its blocks in a storage format, the rest in ``compute``."""

    compute: torch.dtype
    storage: Storage = FP8_BY_TENSOR


StorageDtype = torch.dtype | BlocksStoredAs


def block_linears(module: nn.Module, keep: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The Linear layers inside the module's lists of blocks, by name, without those below a name in ``keep``.

    Everything around the blocks (embedders, final layers) stays as it is: little memory, much influence.
    """
    lists = [name + "." for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and any(name.startswith(prefix) for prefix in lists)
        and not any(name == kept or name.startswith(kept + ".") for kept in keep)
    }
