"""Block streaming of a run: which blocks, and what that frees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.memory.streaming_options import StreamingOptions, pins
from library.training.report.wording import size_text

if TYPE_CHECKING:
    from library.models.pipeline import Pipeline


def stream_blocks(pipeline: Pipeline, options: StreamingOptions) -> str:
    """Let the pipeline stream the blocks of ``--blocks_to_swap``; returns a line that says which.

    Raises UserError when the model has fewer.
    """
    blocks = pipeline.swap_blocks(options.blocks_to_swap or 0, options.block_swap_ring_size)
    pinned = pipeline.device.type == "cuda" and pins(options, blocks.bytes)
    pipeline.stream(blocks, pinned)
    counts = [f"{count} of {len(blocks.sizes[name])} {name}" for name, count in blocks.counts().items() if count]
    memory = "pinned system RAM" if pinned else "system RAM"
    return (
        f"--blocks_to_swap {options.blocks_to_swap}: {' and '.join(counts)} are streamed from "
        f"{size_text(blocks.bytes)} of {memory} through {size_text(blocks.ring_bytes)} on the device, which frees "
        f"{size_text(max(0, blocks.freed))}"
    )
