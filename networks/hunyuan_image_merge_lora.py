"""Merge LoRA files of HunyuanImage-2.1 into one, or into the transformer."""

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
class HunyuanImageMergeTargets:
    """Models"""

    dit: str | None = None
    """Transformer to merge into: a file in any layout or a Diffusers folder; unset merges the files into one LoRA."""


@dataclass
class HunyuanImageMergeLoraOptions:
    """Options of hunyuan_image_merge_lora.py"""

    targets: HunyuanImageMergeTargets = field(default_factory=HunyuanImageMergeTargets)
    files: MergeFiles = field(default_factory=MergeFiles)
    form: MergeForm = field(default_factory=MergeForm)
    numbers: ModelMergeNumbers = field(default_factory=ModelMergeNumbers)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, merge."""
    options = parse_options(HunyuanImageMergeLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    model = ModelOption("--dit", options.targets.dit, "--save_to", options.files.save_to)
    check_model_options(model)
    from networks.lora_tools.family_merge import FamilyMerge
    from networks.lora_tools.hunyuan_image_tools import MERGES

    FamilyMerge(MERGES, options.files, options.numbers, (model,)).run(options.form.concat, options.form.shuffle)


if __name__ == "__main__":
    run_script(main)
