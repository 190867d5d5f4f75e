"""Convert LoRA files for Lumina Image 2.0 between the key names of several programs."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field
from typing import Literal

from library.console import ConsoleOptions, run_script, set_up_console
from library.options import parse_options
from networks.lora_tools.options import ConversionFiles, check_conversion


@dataclass
class LuminaFormats:
    """Formats"""

    src: Literal["sd-scripts", "diffusers", "peft", "comfyui"] | None = None
    """Program whose key names the file has; unset finds out by itself, and what is given is checked."""
    dst: Literal["sd-scripts", "diffusers", "peft", "comfyui"] = "sd-scripts"
    """Program whose key names are written; diffusers and peft are one and the same."""


@dataclass
class ConvertLuminaLoraOptions:
    """Options of convert_lumina_lora.py"""

    files: ConversionFiles = field(default_factory=ConversionFiles)
    formats: LuminaFormats = field(default_factory=LuminaFormats)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the file, convert."""
    options = parse_options(ConvertLuminaLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    save_to = check_conversion(options.files)
    from networks.lora_tools.conversion import convert
    from networks.lora_tools.lumina_tools import CONVERSIONS

    convert(CONVERSIONS, options.files, options.formats.src, options.formats.dst, save_to)


if __name__ == "__main__":
    run_script(main)
