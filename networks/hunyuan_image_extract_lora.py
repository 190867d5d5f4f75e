"""Make a LoRA of the difference between two HunyuanImage-2.1 models, by singular value decomposition."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console
from library.options import parse_options
from networks.lora_tools.options import ExtractOptions, check_extraction


@dataclass
class HunyuanImageExtractLoraOptions:
    """Options of hunyuan_image_extract_lora.py"""

    lora: ExtractOptions = field(default_factory=ExtractOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, extract."""
    options = parse_options(HunyuanImageExtractLoraOptions, __doc__ or "", arguments).lora
    set_up_console(ConsoleOptions())
    save_to = check_extraction(options, "HunyuanImage-2.1")
    from library.models.hunyuan_image.checkpoint import open_transformer
    from library.modelspec import standard_entries
    from networks.lora_hunyuan_image import TRANSFORMER
    from networks.lora_tools.hunyuan_image_lora import VERSION, HunyuanImageLoRA
    from networks.lora_tools.model_layers import extract_transformer

    original = open_transformer(str(options.model_org), option="--model_org")
    tuned = open_transformer(str(options.model_tuned), option="--model_tuned")
    standard = standard_entries(VERSION)
    extract_transformer(original, tuned, TRANSFORMER, options, save_to, HunyuanImageLoRA.entries, standard)


if __name__ == "__main__":
    run_script(main)
