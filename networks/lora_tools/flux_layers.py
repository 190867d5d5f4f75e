"""The layers of a FLUX.1 or Chroma transformer and its text encoders by the names that LoRA files give them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from library.models.clip import ClipFile
from library.models.flux.checkpoint import TransformerFile
from library.models.loading import TensorSource
from library.models.t5 import T5File
from networks.adapters.lora_targets import Target, TargetTable, find_layers, find_targets
from networks.lora_flux import CLIP_L, FLUX, T5XXL
from networks.lora_tools.model_merging import Layer


def transformer_layers(file: TransformerFile) -> dict[str, Layer]:
    """Every layer of the transformer that a LoRA can act on: those of the blocks, the inputs and the last layer."""
    model = file.meta_module()
    extra = find_layers(model, FLUX.transformer, FLUX.known_extra_layers)
    targets = [*find_targets(model, FLUX.transformer), *(target for found in extra.values() for target in found)]
    return _layers(model, targets, file.source)


def block_layers(file: TransformerFile) -> dict[str, Layer]:
    """The layers of the blocks alone, which are those that a LoRA has unless it is asked for more."""
    model = file.meta_module()
    return _layers(model, find_targets(model, FLUX.transformer), file.source)


def encoder_layers(file: ClipFile | T5File) -> dict[str, Layer]:
    """The layers of CLIP-L or T5-XXL."""
    model: nn.Module = file.meta_module()
    table: TargetTable = CLIP_L if isinstance(file, ClipFile) else T5XXL
    return _layers(model, find_targets(model, table), file.source)


def _layers(model: nn.Module, targets: list[Target], source: TensorSource) -> dict[str, Layer]:
    paths: Mapping[nn.Module, str] = {module: path for path, module in model.named_modules()}
    return {target.name: Layer(source, f"{paths[target.module]}.weight") for target in targets}
