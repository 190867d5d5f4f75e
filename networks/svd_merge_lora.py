"""Merge LoRA files into one of a chosen rank, by singular value decomposition."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.options import (
    BlockWeightOptions,
    MergeFiles,
    MergeNumbers,
    check_clamp_quantile,
    check_merge_files,
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
    check_merge_files(options.files)
    from library.families import SDXL, STABLE_DIFFUSION
    from networks.lora_tools.family_merge import merge_files
    from networks.lora_tools.known_lora import open_known
    from networks.lora_tools.merging import sum_of_rank
    from networks.lora_tools.stable_diffusion_merge import MergeRun

    combine = sum_of_rank(svd.new_rank, svd.new_conv_rank or svd.new_rank, svd.clamp_quantile)
    device, lbws = parse_device(svd.device), options.block_weights.lbws
    loras = open_known(options.files.models)
    if not loras:
        run = MergeRun(options.files, options.numbers, [STABLE_DIFFUSION, SDXL], lbws)
        run.merge_files(combine, device=device)
        return
    if lbws:
        raise UserError(f"--lbws is for Stable Diffusion; {loras[0].path} is for {loras[0].model_name}.")
    merge_files(loras, options.files, options.numbers, combine, device=device)


if __name__ == "__main__":
    run_script(main)
