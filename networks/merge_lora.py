"""Merge LoRA files of Stable Diffusion 1.x and 2.x into one, or into a model."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console, warn
from library.options import parse_options
from networks.lora_tools.options import MergeFiles, MergeForm, MergeNumbers


@dataclass
class MergeTarget:
    """Stable Diffusion model"""

    sd_model: str | None = None
    """Model (single file or Diffusers folder) to merge into; unset merges the LoRA files into one LoRA file."""
    v2: bool = False
    """The model is Stable Diffusion 2.x; it is recognised without this."""


@dataclass
class MergeLoraOptions:
    """Options of merge_lora.py"""

    target: MergeTarget = field(default_factory=MergeTarget)
    files: MergeFiles = field(default_factory=MergeFiles)
    form: MergeForm = field(default_factory=MergeForm)
    numbers: MergeNumbers = field(default_factory=MergeNumbers)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(MergeLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    from library.families import STABLE_DIFFUSION
    from networks.lora_tools.merging import concatenated, exact_sum
    from networks.lora_tools.stable_diffusion_merge import MergeRun

    target, form = options.target, options.form
    run = MergeRun(options.files, options.numbers, [STABLE_DIFFUSION])
    if target.sd_model is None and target.v2:
        warn("--v2 has no effect without --sd_model")
    if target.sd_model is not None and (form.concat or form.shuffle):
        warn("--concat and --shuffle have no effect with --sd_model")
    if target.sd_model is None:
        run.merge_files(concatenated if form.concat else exact_sum, form.shuffle)
    else:
        run.merge_into_model(target.sd_model, target.v2)


if __name__ == "__main__":
    run_script(main)
