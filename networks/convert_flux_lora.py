"""Convert LoRA files for FLUX.1 and Chroma between the key names of several programs."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, set_up_console
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.flux_options import ConversionOptions
from networks.lora_tools.options import check_output


@dataclass
class ConvertFluxLoraOptions:
    """Options of convert_flux_lora.py"""

    conversion: ConversionOptions = field(default_factory=ConversionOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the file, convert."""
    options = parse_options(ConvertFluxLoraOptions, __doc__ or "", arguments).conversion
    set_up_console(ConsoleOptions())
    if not options.src_path:
        raise UserError("--src_path needs the LoRA file to convert.")
    if not options.dst_path:
        raise UserError("--dst_path needs the name of the file to write.")
    path = check_output(options.dst_path, [options.src_path], (".safetensors",), "--dst_path")
    from networks.lora_tools.flux_conversion import convert

    convert(options, path)


if __name__ == "__main__":
    run_script(main)
