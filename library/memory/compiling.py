"""``torch.compile`` block by block: faster to compile than a whole model, and it works beside checkpointing.

Blocks of a class share what was compiled as long as their own shapes agree: the 57 blocks of FLUX.1 cost what two cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

COMPILATIONS_OF_A_KIND = 8
"""For gradients or none, training or not; torch's own limit, which it counts for a whole class."""
COMPILATIONS_OF_A_SIZE = 4
"""Where each size of images is compiled on its own."""
MOST_SIZES = 64


def compiled_forwards(
    blocks: Sequence[nn.Module], backend: str, dynamic: bool | None = None
) -> list[Callable[..., Any]]:
    """The forward of each block, compiled when it is first called, for all sizes at once if ``dynamic``.

    Raises torch's limit of compilations where blocks of one class have many shapes, as in a U-Net.
    """
    from torch._dynamo import config

    kinds = {(type(block), tuple(t.shape for t in chain(block.parameters(), block.buffers()))) for block in blocks}
    most = max(Counter(block_class for block_class, _ in kinds).values(), default=0)
    each = COMPILATIONS_OF_A_SIZE * MOST_SIZES if dynamic is False else COMPILATIONS_OF_A_KIND
    config.recompile_limit = max(config.recompile_limit, each * most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * each * most)
    return [torch.compile(block.forward, backend=backend, dynamic=dynamic) for block in blocks]
