"""Make a LoRA of the difference between two FLUX.1 or Chroma models, by singular value decomposition."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.console import ConsoleOptions, run_script, set_up_console
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.options import ExtractOptions, check_extraction

if TYPE_CHECKING:
    from library.models.flux.checkpoint import TransformerFile


@dataclass
class OtherCommandLines:
    """Without effect"""

    mem_eff_safe_open: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: models are always read one tensor at a time."""


@dataclass
class FluxExtractLoraOptions:
    """Options of flux_extract_lora.py"""

    lora: ExtractOptions = field(default_factory=ExtractOptions)
    others: OtherCommandLines = field(default_factory=OtherCommandLines)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, extract."""
    options = parse_options(FluxExtractLoraOptions, __doc__ or "", arguments).lora
    set_up_console(ConsoleOptions())
    save_to = check_extraction(options, "FLUX.1 or Chroma")
    from library.models.flux.checkpoint import open_transformer
    from networks.lora_flux import TRANSFORMER
    from networks.lora_tools.flux_metadata import flux_entries, transformer_entries
    from networks.lora_tools.model_layers import extract_transformer

    original = open_transformer(str(options.model_org), option="--model_org", model_type=None)
    tuned = open_transformer(str(options.model_tuned), option="--model_tuned", model_type=None)
    refuse_two_kinds(original, tuned)
    entries, standard = flux_entries(original.variant), transformer_entries(original.variant)
    extract_transformer(original, tuned, TRANSFORMER, options, save_to, entries, standard)


def refuse_two_kinds(original: TransformerFile, tuned: TransformerFile) -> None:
    """Raises UserError when one model is FLUX.1 and the other Chroma."""
    names = {"flux": "FLUX.1", "chroma": "Chroma"}
    if original.model_type != tuned.model_type:
        raise UserError(
            f"--model_org is {names[original.model_type]}, --model_tuned {names[tuned.model_type]}; both must be of one"
            " kind."
        )


if __name__ == "__main__":
    run_script(main)
