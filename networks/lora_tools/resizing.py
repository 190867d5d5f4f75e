"""A LoRA file in a lower rank: each module's best approximation, under the keys that the file has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from library.safetensors_io import json_object
from networks.adapters.lora_file import PEFT_METADATA, LoRAWeights
from networks.lora_tools.arithmetic import (
    Retention,
    dynamic_rank,
    retention,
    singular_parts,
    strength,
    truncated,
    with_storable_alpha,
)
from networks.lora_tools.metadata import network_entries
from networks.lora_tools.named_lora import NamedLoRA


@dataclass(frozen=True)
class NewRank:
    """How a module's rank is found: ``rank``, for convolutions of any size ``conv_rank``; with a ``method`` (see
    ``arithmetic.RANK_METHODS``) and its ``parameter`` these are upper limits."""

    rank: int
    conv_rank: int
    method: str | None = None
    parameter: float = 0.0

    def of(self, singular_values: Tensor, is_conv: bool) -> int:
        """The rank of a module."""
        limit = min(self.conv_rank if is_conv else self.rank, len(singular_values))
        if self.method is None:
            return limit
        return dynamic_rank(singular_values, self.method, self.parameter, limit)


@dataclass(frozen=True)
class Resized:
    """A module in its new rank and what is left of it."""

    weights: LoRAWeights
    old_rank: int
    retention: Retention


def resized(lora: NamedLoRA, new_rank: NewRank, device: torch.device | str = "cpu") -> dict[str, Resized]:
    """Every module of the file, on the CPU; alpha changes with the rank, so that alpha / rank stays."""
    modules = {}
    for name in tqdm(lora.modules, desc="modules", mininterval=1):
        weights = lora.load(name, device)
        parts = singular_parts(weights)
        rank = new_rank.of(parts.s, weights.down.dim() == 4)
        made = truncated(parts, rank, strength(weights), weights)
        moved = LoRAWeights(made.down.cpu(), made.up.cpu(), made.alpha)
        modules[name] = Resized(moved, len(weights.down), retention(parts.s, rank))
    return modules


def resized_tensors(lora: NamedLoRA, modules: Mapping[str, Resized], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the new file, in ``dtype``; what belongs to no module stays as it is.

    Where the file has no alpha, readers take the rank for it; a strength other than 1 then goes into up.
    """
    tensors = {key: lora.checkpoint.load(key) for key in lora.others}
    for name, module in modules.items():
        keys, weights = lora.keys[name], with_storable_alpha(module.weights, dtype)
        if keys.alpha is None:
            weights = weights._replace(up=weights.up * strength(weights))
        else:
            tensors[keys.alpha] = torch.tensor(weights.alpha, dtype=torch.float64).to(dtype)
        tensors[keys.down], tensors[keys.up] = weights.down.to(dtype), weights.up.to(dtype)
    return tensors


def resized_metadata(lora: NamedLoRA, modules: Mapping[str, Resized], new_rank: NewRank) -> dict[str, str]:
    """The file's own metadata with the new ranks and a word in ``ss_training_comment``; hashes are not in it.

    PEFT's settings would be wrong now: readers find ranks in the tensors, and the strength is in there too.
    """
    stale = ("sshs_", "modelspec.hash", PEFT_METADATA)
    metadata = {key: value for key, value in lora.metadata.items() if not key.startswith(stale)}
    old_rank = max(module.old_rank for module in modules.values())
    if new_rank.method is None:
        conv = "" if new_rank.conv_rank == new_rank.rank else f" (conv: {new_rank.conv_rank})"
        comment = f"dimension is resized from {old_rank} to {new_rank.rank}{conv}"
        weights = {name: module.weights for name, module in modules.items()}
        entries = network_entries(weights, has_conv_rank=lambda shape: len(shape) == 4)
    else:
        comment = f"Dynamic resize with {new_rank.method}: {new_rank.parameter} from {old_rank}"
        entries = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    metadata["ss_training_comment"] = f"{comment}; {metadata.get('ss_training_comment', '')}"
    arguments = _new_arguments(metadata, entries)
    return {**metadata, **entries, **arguments}


def _new_arguments(metadata: Mapping[str, str], entries: dict[str, str]) -> dict[str, str]:
    """``ss_network_args`` with the new rank and alpha of convolutions, where the file has any."""
    made = json.loads(entries.pop("ss_network_args", '{"conv_dim": "Dynamic", "conv_alpha": "Dynamic"}'))
    own = json_object(metadata.get("ss_network_args"))
    if "conv_dim" not in own:
        return {}
    return {"ss_network_args": json.dumps({**own, **made})}


def module_report(modules: Mapping[str, Resized]) -> str:
    """A line for each module, and the mean of what was kept."""
    lines = []
    for name, module in modules.items():
        kept = module.retention
        lines.append(
            f"{name:75} | rank {module.old_rank} -> {len(module.weights.down)}, alpha {module.weights.alpha:g}, sum(S)"
            f" retained: {kept.sum:.1%}, fro retained: {kept.norm:.1%}, max(S) ratio: {kept.ratio:.1f}"
        )
    norms = [module.retention.norm for module in modules.values()]
    mean = sum(norms) / len(norms)
    deviation = (sum((norm - mean) ** 2 for norm in norms) / len(norms)) ** 0.5
    lines.append(f"Average Frobenius norm retention: {mean:.2%} | std: {deviation:0.3f}")
    return "\n".join(lines)
