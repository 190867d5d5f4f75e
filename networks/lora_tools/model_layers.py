"""The layers of an opened transformer or text encoder by the names that LoRA files give them, and their differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from library.errors import UserError
from library.models.pipeline import OpenedPart
from networks.adapters.lora_targets import TargetTable, find_layers, find_targets
from networks.lora_tools.extraction import Comparison, Extraction, Pairs, extract_layers
from networks.lora_tools.metadata import extracted_metadata
from networks.lora_tools.model_merging import Layer
from networks.lora_tools.options import parse_device, save_modules

if TYPE_CHECKING:
    from networks.lora_tools.options import ExtractOptions


def layers_of(file: OpenedPart[Any], table: TargetTable, extra: Iterable[str] = ()) -> dict[str, Layer]:
    """The layers of a model that a LoRA has: those of the table's classes and, by their paths, ``extra`` ones."""
    model: nn.Module = file.meta_module()
    outer = [target for found in find_layers(model, table, extra).values() for target in found]
    paths: Mapping[nn.Module, str] = {module: path for path, module in model.named_modules()}
    targets = {target.name: target for target in (*find_targets(model, table), *outer)}
    return {name: Layer(file.source, f"{paths[target.module]}.weight") for name, target in targets.items()}


def layer_pairs(original: OpenedPart[Any], tuned: OpenedPart[Any], table: TargetTable) -> Pairs:
    """The layers of the table's classes in both models. Raises UserError when the models differ in structure."""
    first, second = layers_of(original, table), layers_of(tuned, table)
    for name in {**first, **second}:
        layers = first.get(name), second.get(name)
        shapes = [layer.source.shape(layer.tensor) if layer else None for layer in layers]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{tuned.source.checkpoint.label} has another structure than {original.source.checkpoint.label}"
                f" ({name} is missing or of another size); no LoRA can lead from one to the other."
            )
    return {name: (layer, second[name]) for name, layer in first.items()}


def extract_transformer(
    original: OpenedPart[Any],
    tuned: OpenedPart[Any],
    table: TargetTable,
    options: ExtractOptions,
    save_to: Path,
    entries: Mapping[str, str],
    standard: Mapping[str, str],
) -> None:
    """Write the difference of two transformers as a LoRA; for ``entries`` and ``standard`` see ``extracted_metadata``.

    Raises UserError when they differ in structure, or in no layer of the table's classes.
    """
    device = parse_device(options.device)
    pairs = layer_pairs(original, tuned, table)
    extraction = Extraction(options.dim, None, options.clamp_quantile, 0.0)
    modules = extract_layers(pairs, Comparison(device=device), extraction)
    metadata = extracted_metadata(entries, standard, modules, save_to, options.no_metadata)
    save_modules(save_to, modules, metadata, options.save_precision or "float")
