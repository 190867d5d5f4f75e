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
from networks.lora_tools.options import (
    Precision,
    check_clamp_quantile,
    check_output,
    check_rank,
    parse_device,
    save_modules,
)

if TYPE_CHECKING:
    from pathlib import Path

    from library.models.flux.checkpoint import TransformerFile
    from networks.adapters.lora_file import LoRAWeights
    from networks.lora_tools.extraction import Pairs


@dataclass
class FluxExtractOptions:
    """Models and LoRA"""

    model_org: str | None = None
    """Original transformer: a file in any layout, one of its shards, or a Diffusers folder."""
    model_tuned: str | None = None
    """Transformer that was made from it; the LoRA leads from the original to this one."""
    save_to: str | None = None
    """File to write."""
    save_precision: Precision | None = None
    """Dtype of the file; unset means float."""
    dim: int = 4
    """Rank, where a layer is not smaller; alpha is the same."""
    device: str | None = None
    """Device to compute on, such as cuda; unset means the CPU."""
    clamp_quantile: float = 0.99
    """Cut off values of the result beyond this quantile; 1 cuts nothing off."""
    mem_eff_safe_open: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: models are always read one tensor at a time."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


@dataclass
class FluxExtractLoraOptions:
    """Options of flux_extract_lora.py"""

    lora: FluxExtractOptions = field(default_factory=FluxExtractOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, extract."""
    options = parse_options(FluxExtractLoraOptions, __doc__ or "", arguments).lora
    set_up_console(ConsoleOptions())
    save_to = check_options(options)
    from library.models.flux.checkpoint import open_transformer
    from networks.lora_tools.extraction import Comparison, Extraction, extract_layers

    device = parse_device(options.device)
    original = open_transformer(str(options.model_org), option="--model_org", model_type=None)
    tuned = open_transformer(str(options.model_tuned), option="--model_tuned", model_type=None)
    pairs = layer_pairs(original, tuned)
    extraction = Extraction(options.dim, None, options.clamp_quantile, 0.0)
    modules = extract_layers(pairs, Comparison(device=device), extraction)
    metadata = extracted_metadata(original, modules, save_to, options.no_metadata)
    save_modules(save_to, modules, metadata, options.save_precision or "float")


def check_options(options: FluxExtractOptions) -> Path:
    """The file to write. Raises UserError for what the options alone show to be wrong."""
    for value, option in ((options.model_org, "--model_org"), (options.model_tuned, "--model_tuned")):
        if not value:
            raise UserError(f"{option} needs a FLUX.1 or Chroma transformer.")
    check_rank(options.dim, "--dim")
    check_clamp_quantile(options.clamp_quantile)
    return check_output(options.save_to, [options.model_org, options.model_tuned])


def layer_pairs(original: TransformerFile, tuned: TransformerFile) -> Pairs:
    """The layers of the blocks in both models. Raises UserError when the models differ in kind or structure."""
    from networks.lora_tools.flux_layers import block_layers

    names = {"flux": "FLUX.1", "chroma": "Chroma"}
    if original.model_type != tuned.model_type:
        raise UserError(
            f"--model_org is {names[original.model_type]}, --model_tuned {names[tuned.model_type]}; both must be of one"
            " kind."
        )
    first, second = block_layers(original), block_layers(tuned)
    for name in {**first, **second}:
        layers = first.get(name), second.get(name)
        shapes = [layer.source.shape(layer.tensor) if layer else None for layer in layers]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{tuned.source.checkpoint.label} has another structure than {original.source.checkpoint.label}"
                f" ({name} is missing or of another size); no LoRA can lead from one to the other."
            )
    return {name: (layer, second[name]) for name, layer in first.items()}


def extracted_metadata(
    original: TransformerFile, modules: dict[str, LoRAWeights], save_to: Path, no_metadata: bool
) -> dict[str, str]:
    """The metadata of the new file, without hashes."""
    from networks.lora_tools.flux_metadata import flux_entries, transformer_entries
    from networks.lora_tools.metadata import network_entries, with_modelspec

    entries = {**flux_entries(original.variant), **network_entries(modules), "ss_network_args": "{}"}
    if no_metadata:
        return entries
    standard = transformer_entries(original.variant)
    standard["modelspec.architecture"] += "/lora"
    return with_modelspec({**standard, **entries}, save_to)


if __name__ == "__main__":
    run_script(main)
