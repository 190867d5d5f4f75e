"""Merge LoRA files of Stable Diffusion XL into one, or into a model."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console, warn
from library.options import parse_options
from networks.lora_tools.options import BlockWeightOptions, MergeFiles, MergeForm, MergeNumbers


@dataclass
class SdxlMergeTarget:
    """Stable Diffusion XL model"""

    sd_model: str | None = None
    """Model (single file or Diffusers folder) to merge into; unset merges the LoRA files into one LoRA file."""


@dataclass
class SdxlMergeOptions:
    """Options of sdxl_merge_lora.py"""

    target: SdxlMergeTarget = field(default_factory=SdxlMergeTarget)
    files: MergeFiles = field(default_factory=MergeFiles)
    block_weights: BlockWeightOptions = field(default_factory=BlockWeightOptions)
    form: MergeForm = field(default_factory=MergeForm)
    numbers: MergeNumbers = field(default_factory=MergeNumbers)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(SdxlMergeOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    from library.families import SDXL
    from networks.lora_tools.merging import concatenated, exact_sum
    from networks.lora_tools.stable_diffusion_merge import MergeRun

    target, form = options.target, options.form
    run = MergeRun(options.files, options.numbers, [SDXL], options.block_weights.lbws)
    if target.sd_model is not None and (form.concat or form.shuffle):
        warn("--concat and --shuffle have no effect with --sd_model")
    if target.sd_model is None:
        run.merge_files(concatenated if form.concat else exact_sum, form.shuffle)
    else:
        run.merge_into_model(target.sd_model)


if __name__ == "__main__":
    run_script(main)
