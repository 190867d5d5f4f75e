"""Merge LoRA files of Lumina Image 2.0 into one, or into the models."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console
from library.options import parse_options
from networks.lora_tools.options import MergeFiles, MergeForm, ModelMergeNumbers, ModelOption, check_model_options


@dataclass
class LuminaMergeTargets:
    """Models"""

    lumina_model: str | None = None
    """Transformer to merge into: a file in any layout or a Diffusers folder; unset merges the files into one LoRA."""
    gemma2: str | None = None
    """Gemma 2 to merge into."""
    gemma2_save_to: str | None = None
    """File to write the merged Gemma 2 to; of a file that holds both models, the same as --save_to."""


@dataclass
class LuminaMergeLoraOptions:
    """Options of lumina_merge_lora.py"""

    targets: LuminaMergeTargets = field(default_factory=LuminaMergeTargets)
    files: MergeFiles = field(default_factory=MergeFiles)
    form: MergeForm = field(default_factory=MergeForm)
    numbers: ModelMergeNumbers = field(default_factory=ModelMergeNumbers)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(LuminaMergeLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    targets = options.targets
    models = (
        ModelOption("--lumina_model", targets.lumina_model, "--save_to", options.files.save_to),
        ModelOption("--gemma2", targets.gemma2, "--gemma2_save_to", targets.gemma2_save_to),
    )
    check_model_options(*models)
    from networks.lora_tools.family_merge import FamilyMerge
    from networks.lora_tools.lumina_tools import MERGES

    FamilyMerge(MERGES, options.files, options.numbers, models).run(options.form.concat, options.form.shuffle)


if __name__ == "__main__":
    run_script(main)
