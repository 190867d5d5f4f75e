"""Merge LoRA files of FLUX.1 or Chroma into one, or into the models."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console, warn
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.flux_options import FluxMergeNumbers, FluxMergeTargets
from networks.lora_tools.options import MergeFiles, MergeForm


@dataclass
class FluxMergeLoraOptions:
    """Options of flux_merge_lora.py"""

    targets: FluxMergeTargets = field(default_factory=FluxMergeTargets)
    files: MergeFiles = field(default_factory=MergeFiles)
    form: MergeForm = field(default_factory=MergeForm)
    numbers: FluxMergeNumbers = field(default_factory=FluxMergeNumbers)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(FluxMergeLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    check_targets(options.targets, options.files.save_to)
    from networks.lora_tools.flux_merge import FluxMergeRun

    run = FluxMergeRun(options.files, options.targets, options.numbers)
    if not run.models:
        run.merge_files(options.form.concat, options.form.shuffle)
        return
    if options.form.concat or options.form.shuffle:
        warn("--concat and --shuffle have no effect on models")
    run.merge_into_models()


def check_targets(targets: FluxMergeTargets, save_to: str | None) -> None:
    """Raises UserError unless every model has a file to write, and every file a model."""
    pairs = (
        (targets.clip_l, "--clip_l", targets.clip_l_save_to, "--clip_l_save_to"),
        (targets.t5xxl, "--t5xxl", targets.t5xxl_save_to, "--t5xxl_save_to"),
    )
    for model, option, target, target_option in pairs:
        if bool(model) != bool(target):
            missing, given = (target_option, option) if model else (option, target_option)
            raise UserError(f"{given} needs {missing} too.")
    if not targets.flux_model and (targets.clip_l or targets.t5xxl) and save_to:
        raise UserError("--save_to is for the merged transformer; give --flux_model too, or leave --save_to out.")
    if targets.flux_model and not save_to:
        raise UserError("--flux_model needs --save_to too.")


if __name__ == "__main__":
    run_script(main)
