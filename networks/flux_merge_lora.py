"""Merge LoRA files of FLUX.1 or Chroma into one, or into the models."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console
from library.options import parse_options
from networks.lora_tools.options import (
    MergeFiles,
    MergeForm,
    ModelMergeNumbers,
    ModelOption,
    check_model_options,
    parse_device,
)


@dataclass
class FluxMergeTargets:
    """Models"""

    flux_model: str | None = None
    """Transformer to merge into: a file in any layout or a Diffusers folder; unset merges the files into one LoRA."""
    clip_l: str | None = None
    """CLIP-L to merge into."""
    t5xxl: str | None = None
    """T5-XXL to merge into."""
    clip_l_save_to: str | None = None
    """File to write the merged CLIP-L to."""
    t5xxl_save_to: str | None = None
    """File to write the merged T5-XXL to."""


@dataclass
class OtherCommandLines:
    """Without effect"""

    loading_device: str = "cpu"
    """Accepted for kohya-ss/sd-scripts' command lines: tensors are read one at a time, where they are added to."""
    mem_eff_load_save: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: models are always read and written one tensor at a time."""
    diffusers: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: files with the names of other programs are always read."""


@dataclass
class FluxMergeLoraOptions:
    """Options of flux_merge_lora.py"""

    targets: FluxMergeTargets = field(default_factory=FluxMergeTargets)
    files: MergeFiles = field(default_factory=MergeFiles)
    form: MergeForm = field(default_factory=MergeForm)
    numbers: ModelMergeNumbers = field(default_factory=ModelMergeNumbers)
    others: OtherCommandLines = field(default_factory=OtherCommandLines)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(FluxMergeLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    targets = options.targets
    models = (
        ModelOption("--flux_model", targets.flux_model, "--save_to", options.files.save_to),
        ModelOption("--clip_l", targets.clip_l, "--clip_l_save_to", targets.clip_l_save_to),
        ModelOption("--t5xxl", targets.t5xxl, "--t5xxl_save_to", targets.t5xxl_save_to),
    )
    check_model_options(*models)
    from networks.lora_tools.family_merge import FamilyMerge
    from networks.lora_tools.flux_tools import MERGES

    parse_device(options.others.loading_device, "--loading_device")
    FamilyMerge(MERGES, options.files, options.numbers, models).run(options.form.concat, options.form.shuffle)


if __name__ == "__main__":
    run_script(main)
