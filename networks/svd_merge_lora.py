"""Merge LoRA files of Stable Diffusion into one of a chosen rank, by singular value decomposition."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console
from library.options import parse_options
from networks.lora_tools.options import (
    BlockWeightOptions,
    MergeFiles,
    MergeNumbers,
    check_clamp_quantile,
    check_rank,
    parse_device,
)


@dataclass
class SvdOptions:
    """Rank"""

    new_rank: int = 4
    """Rank of the result, where the files together have as much."""
    new_conv_rank: int | None = None
    """Rank of convolutions wider than 1x1; unset means --new_rank."""
    clamp_quantile: float = 0.99
    """Cut off values of the result beyond this quantile; 1 cuts nothing off."""
    device: str | None = None
    """Device to compute on, such as cuda; unset means the CPU."""


@dataclass
class SvdMergeOptions:
    """Options of svd_merge_lora.py"""

    files: MergeFiles = field(default_factory=MergeFiles)
    block_weights: BlockWeightOptions = field(default_factory=BlockWeightOptions)
    svd: SvdOptions = field(default_factory=SvdOptions)
    numbers: MergeNumbers = field(default_factory=MergeNumbers)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(SvdMergeOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    svd = options.svd
    check_rank(svd.new_rank, "--new_rank")
    check_rank(svd.new_conv_rank, "--new_conv_rank")
    check_clamp_quantile(svd.clamp_quantile)
    from library.families import SDXL, STABLE_DIFFUSION
    from networks.lora_tools.merging import sum_of_rank
    from networks.lora_tools.stable_diffusion_merge import MergeRun

    run = MergeRun(options.files, options.numbers, [STABLE_DIFFUSION, SDXL], options.block_weights.lbws)
    combine = sum_of_rank(svd.new_rank, svd.new_conv_rank or svd.new_rank, svd.clamp_quantile)
    run.merge_files(combine, device=parse_device(svd.device))


if __name__ == "__main__":
    run_script(main)
