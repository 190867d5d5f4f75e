"""Write a FLUX.1 or Chroma transformer in the Diffusers layout as one file with the original names."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field

from library.console import ConsoleOptions, run_script, say, set_up_console
from library.devices import parse_dtype
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.options import check_output


@dataclass
class DiffusersConversionOptions:
    """Files and numbers"""

    diffusers_path: str | None = None
    """Model folder, its transformer folder, or one of the shards; a file in any other known layout works too."""
    save_to: str | None = None
    """File to write."""
    save_precision: str | None = None
    """Dtype of the file: float, fp16, bf16 or fp8; unset keeps that of each tensor, scaled fp8 becomes bf16."""
    mem_eff_load_save: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: tensors are always read and written one at a time."""


@dataclass
class ConvertDiffusersToFluxOptions:
    """Options of convert_diffusers_to_flux.py"""

    conversion: DiffusersConversionOptions = field(default_factory=DiffusersConversionOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, open the model, write the file; memory holds one tensor at a time."""
    options = parse_options(ConvertDiffusersToFluxOptions, __doc__ or "", arguments).conversion
    set_up_console(ConsoleOptions())
    if not options.diffusers_path:
        raise UserError("--diffusers_path needs a FLUX.1 or Chroma transformer in the Diffusers layout.")
    save_to = check_output(options.save_to, [options.diffusers_path], (".safetensors",))
    import torch

    from library.models.flux.checkpoint import open_transformer
    from library.safetensors_io import save_one_by_one
    from networks.lora_tools.model_merging import load_converted

    dtype = parse_dtype(options.save_precision, "--save_precision") if options.save_precision else None
    source = open_transformer(options.diffusers_path, option="--diffusers_path", model_type=None).source
    described = {
        name: torch.empty(source.shape(name), dtype=dtype or source.stored_dtype(name), device="meta")
        for name in source.names()
    }
    metadata = {**source.checkpoint.metadata, **source.config_entry}
    save_one_by_one(described, lambda name: load_converted(source, name, described[name].dtype), save_to, metadata)
    say(f"saved {save_to}: {len(described)} tensors, {save_to.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
