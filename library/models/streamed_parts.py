"""Which blocks of a pipeline are streamed or spread over processes, and what that frees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.console import size_text
from library.memory.streaming_options import StreamingOptions, pins

if TYPE_CHECKING:
    from library.memory.plan import Sharding
    from library.memory.stream_choice import StreamedBlocks
    from library.models.pipeline import Pipeline


def stream_blocks(pipeline: Pipeline, options: StreamingOptions) -> Iterator[str]:
    """Let the pipeline stream the blocks that the options say; yields lines that say which.

    Raises UserError when the model has fewer than ``--blocks_to_swap``.
    """
    if isinstance(options.blocks_to_swap, int) and options.blocks_to_swap and pipeline.denoiser in pipeline.parts:
        blocks = pipeline.swap_blocks(options.blocks_to_swap, options.block_swap_ring_size)
        yield _stream(pipeline, pipeline.denoiser, blocks, options, f"--blocks_to_swap {options.blocks_to_swap}")
    if options.stream_text_encoders:
        for encoder in pipeline.encoders:
            if encoder in pipeline.parts:
                blocks = pipeline.every_block(encoder, options.block_swap_ring_size)
                yield _stream(pipeline, encoder, blocks, options, f"--stream_text_encoders: {encoder}")


def _stream(pipeline: Pipeline, part: str, blocks: StreamedBlocks, options: StreamingOptions, why: str) -> str:
    pinned = pipeline.device.type == "cuda" and pins(options, blocks.bytes)
    pipeline.stream(part, blocks, pinned)
    counts = [f"{count} of {len(blocks.sizes[name])} {name}" for name, count in blocks.counts().items() if count]
    memory = "pinned system RAM" if pinned else "system RAM"
    return (
        f"{why}: {' and '.join(counts)} are streamed from {size_text(blocks.bytes)} of {memory} through "
        f"{size_text(blocks.ring_bytes)} on the device, which frees {size_text(max(0, blocks.freed))}"
    )


def spread_blocks(pipeline: Pipeline, sharding: Sharding | None) -> Iterator[str]:
    """Let the denoiser's blocks be spread over the processes of a machine, if requested; yields a line about it."""
    if sharding is not None and pipeline.denoiser in pipeline.parts:
        pipeline.spread(sharding)
        blocks = pipeline.sharded[pipeline.denoiser]
        yield (
            f"FSDP: {len(blocks.sizes)} blocks of {size_text(blocks.bytes)} are spread over {blocks.processes} "
            f"processes, {size_text(blocks.share_bytes)} each beside {size_text(blocks.gathered_bytes)} for those that "
            f"work, which frees {size_text(max(0, blocks.freed))} of each device"
        )
