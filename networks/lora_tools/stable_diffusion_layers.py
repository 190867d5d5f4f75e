"""The layers of a Stable Diffusion model by the names that LoRA files give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.families import SDXL, Family
from library.models.loading import TensorSource, require_fit
from library.models.stable_diffusion.checkpoint import StableDiffusionModel
from networks.adapters.lora_targets import Rules, Target, TargetTable, find_targets
from networks.lora import SD_PATHS, SDXL_PATHS, rules_of
from networks.lora_tools.model_merging import Layer

_SDXL_NAMES = {theirs.replace(".", "_"): ours.replace(".", "_") for ours, theirs in SDXL_PATHS.items()}
_SD_NAMES = {ours.replace(".", "_"): theirs.replace(".", "_") for ours, theirs in SD_PATHS.items()}


@dataclass(frozen=True)
class Part:
    """A U-Net or text encoder: its structure on the meta device under the names of files, and where its tensors are."""

    tree: nn.Module
    """With the names of LoRA files."""
    paths: dict[nn.Module, str]
    """Each layer's path in ``source``."""
    source: TensorSource
    table: TargetTable

    def layer(self, target: Target) -> Layer:
        """Where the target's weight is."""
        return Layer(self.source, f"{self.paths[target.module]}.weight")

    def all_layers(self) -> Iterator[Target]:
        """Every Linear and Conv2d, whether or not our own LoRA trains it."""
        for path, module in self.tree.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield Target(self.table.file_path(path), module, self.table)

    def trained_layers(self, with_conv: bool) -> list[Target]:
        """The layers that ``networks.lora`` trains, with wide convolutions or without."""
        return find_targets(self.tree, self.table, with_conv)


def parts_of(model: StableDiffusionModel) -> tuple[Rules, list[Part]]:
    """The rules of the model's family, and its parts: the text encoders in order, then the U-Net.

    Raises UserError where tensors are missing or have other shapes than the rest of the model implies.
    """
    encoders = [encoder.meta_module() for encoder in model.text_encoders]
    unet: Any = model.unet.meta_module()
    for module, file in zip((*encoders, unet), (*model.text_encoders, model.unet)):
        require_fit(module, file.source)
    rules, tree = rules_of(unet, encoders)
    parts = [
        Part(encoder, _paths(encoder), file.source, table)
        for encoder, file, table in zip(encoders, model.text_encoders, rules.text_encoders)
    ]
    return rules, [*parts, Part(tree, _paths(unet), model.unet.source, rules.transformer)]


def _paths(model: nn.Module) -> dict[nn.Module, str]:
    return {module: path for path, module in model.named_modules()}


def layers_of(model: StableDiffusionModel) -> tuple[dict[str, Layer], dict[str, str]]:
    """Every layer by its LoRA name, and the LoRA name for each name that another program gives it."""
    rules, parts = parts_of(model)
    layers: dict[str, Layer] = {}
    names: dict[str, str] = {}
    for part in parts:
        for target in part.all_layers():
            layers[target.name] = part.layer(target)
            names |= {alias: target.name for alias, _ in rules.aliases(target)}
    return layers, {**names, **{name: name for name in layers}}


def usual_name(name: str, family: Family) -> str:
    """A LoRA name as ``networks.lora`` writes it, where another program took the names of the other U-Net layout."""
    if family is not SDXL and name.startswith("lora_te1_"):
        return name.replace("lora_te1_", "lora_te_", 1)
    names = _SDXL_NAMES if family is SDXL else _SD_NAMES
    path = name.removeprefix("lora_unet_")
    head = path
    while head not in names:
        head, underscore, _ = head.rpartition("_")
        if not underscore:
            return name
    return f"lora_unet_{names[head]}{path[len(head) :]}"
