"""How much of a device's memory tensors may take, for ``--vram_budget`` and ``--blocks_to_swap auto``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
RESERVED_BYTES = round(0.8 * GIB)
"""Of the budget, left for the device's context and for what kernels need inside them."""
RESERVED_SHARE = 0.05
"""A share of the budget in addition, for fragmentation."""


def budget_bytes(vram_budget: float | None, device: torch.device) -> int:
    """``--vram_budget`` (GiB) in bytes; if unset, all memory of the device. Raises UserError where there is none."""
    if vram_budget is not None:
        return round(vram_budget * GIB)
    if device.type != "cuda":
        raise UserError(f"--blocks_to_swap auto: {device} has no memory of its own; give a number or --vram_budget.")
    import torch

    return torch.cuda.mem_get_info(device)[1]


def usable(budget: int) -> int:
    """Bytes of a device of ``budget`` bytes that tensors may take."""
    return math.floor(budget * (1 - RESERVED_SHARE)) - RESERVED_BYTES


def least_budget(needed: int) -> float:
    """The least ``--vram_budget``, in quarters of a GiB, for tensors of ``needed`` bytes."""
    return math.ceil((needed + RESERVED_BYTES) / (1 - RESERVED_SHARE) / GIB * 4) / 4


def check_budget(vram_budget: float | None) -> None:
    """Raises UserError for a budget that cannot be."""
    if vram_budget is not None and vram_budget <= 0:
        raise UserError(f"--vram_budget must be above 0 GiB, not {vram_budget:g}.")
