"""Options of block streaming."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import UserError


@dataclass
class StreamingOptions:
    """Block streaming"""

    blocks_to_swap: int | Literal["auto"] | None = None
    """Blocks of the U-Net or transformer whose memory on the device is freed: they are streamed from system RAM; auto
    streams as many as the device's memory needs."""
    stream_text_encoders: bool = False
    """Stream all blocks of the text encoders from system RAM: the device then holds little of T5-XXL's 9 GB."""
    block_swap_ring_size: int = 2
    """Streamed blocks that the device has memory for at a time; more than 2 make up for uneven copying speed."""
    use_pinned_memory_for_block_swap: bool = False
    """Pin the streamed blocks' system RAM also on Windows and where they take more than half of it."""
    block_swap_h2d_only: bool = False
    """Accepted for command lines of musubi-tuner; blocks are only ever copied to the device anyway."""


def check_streaming_options(options: StreamingOptions, offloads_checkpoints: bool = False) -> None:
    """Raises UserError for numbers that cannot be, and beside ``--cpu_offload_checkpointing``."""
    if isinstance(options.blocks_to_swap, int) and options.blocks_to_swap < 0:
        raise UserError(f"--blocks_to_swap must not be negative, but is {options.blocks_to_swap}.")
    if options.block_swap_ring_size < 1:
        raise UserError(f"--block_swap_ring_size must be at least 1, not {options.block_swap_ring_size}.")
    if options.blocks_to_swap and offloads_checkpoints:
        raise UserError("--blocks_to_swap and --cpu_offload_checkpointing are mutually exclusive.")


def pins(options: StreamingOptions, size: int) -> bool:
    """Whether ``size`` bytes of streamed blocks are to be pinned: on Linux up to half of the RAM, else if requested."""
    import psutil

    if options.use_pinned_memory_for_block_swap:
        return True
    return sys.platform == "linux" and not _is_wsl() and size <= psutil.virtual_memory().total / 2


def _is_wsl() -> bool:
    """Windows' Linux, which pins little memory."""
    version = Path("/proc/version")
    return version.is_file() and "microsoft" in version.read_text(errors="replace").lower()
