"""The difference between two models of one family as a LoRA: read tensor by tensor, decomposed module by module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from library.console import say, warn
from library.errors import UserError
from library.models.stable_diffusion.checkpoint import StableDiffusionModel
from networks.adapters.lora_file import LoRAWeights
from networks.lora_tools.arithmetic import extracted
from networks.lora_tools.model_merging import Layer
from networks.lora_tools.named_lora import kernel_is_wide
from networks.lora_tools.stable_diffusion_layers import parts_of


@dataclass(frozen=True)
class Comparison:
    """How weights of the two models are read and subtracted."""

    load_dtype: torch.dtype | None = None
    """Both are rounded to it first; None takes the numbers of the files, of scaled fp8 times their scales."""
    original_device: torch.device | str = "cpu"
    tuned_device: torch.device | str = "cpu"
    """Where the tensors of each model are read to."""
    device: torch.device | str = "cpu"
    """Where they are subtracted and decomposed."""

    def difference(self, original: Layer, tuned: Layer) -> Tensor:
        """Tuned - original in float32, in the shape that the original model gives the layer."""
        dtype = self.load_dtype or torch.float32
        new = tuned.source.load(tuned.tensor, dtype, self.tuned_device).to(self.device, torch.float32)
        old = original.source.load(original.tensor, dtype, self.original_device)
        old = old.to(self.device, torch.float32)
        return new.reshape(old.shape).sub_(old)


@dataclass(frozen=True)
class Extraction:
    """What is made of a difference."""

    rank: int
    conv_rank: int | None
    """Of convolutions wider than 1x1; None leaves them out."""
    clamp_quantile: float
    min_diff: float
    """The text encoders are left out unless a weight differs by more."""

    def of(self, difference: Tensor) -> LoRAWeights:
        """The module, on the CPU."""
        is_wide = kernel_is_wide(difference.shape)
        rank = self.conv_rank if is_wide and self.conv_rank is not None else self.rank
        made = extracted(difference, rank, self.clamp_quantile)
        return LoRAWeights(made.down.cpu(), made.up.cpu(), made.alpha)


Pairs = dict[str, tuple[Layer, Layer]]
"""LoRA name -> the layer in the original and in the tuned model."""


def layer_pairs(original: StableDiffusionModel, tuned: StableDiffusionModel, with_conv: bool) -> tuple[Pairs, Pairs]:
    """The layers that LoRA trains: those of the text encoders, and those of the U-Net.

    Raises UserError when the models differ in structure.
    """
    _, parts = parts_of(original)
    _, others = parts_of(tuned)
    text: Pairs = {}
    unet: Pairs = {}
    for part, other in zip(parts, others):
        targets = {target.name: target for target in other.trained_layers(with_conv)}
        for target in part.trained_layers(with_conv):
            match = targets.get(target.name)
            if match is None or match.module.weight.shape[:2] != target.module.weight.shape[:2]:
                raise UserError(
                    f"{other.source.checkpoint.label} has another structure than {part.source.checkpoint.label}"
                    f" ({target.name} is missing or of another size); no LoRA can lead from one to the other."
                )
            group = text if target.table.is_text_encoder else unet
            group[target.name] = (part.layer(target), other.layer(match))
    return text, unet


def extract(text: Pairs, unet: Pairs, comparison: Comparison, extraction: Extraction) -> dict[str, LoRAWeights]:
    """A LoRA that leads from the original to the tuned model; layers that are the same in both are left out.

    Raises UserError when nothing differs or the models hold numbers that are not finite.
    """
    return extract_layers({**_changed_encoders(text, comparison, extraction.min_diff), **unet}, comparison, extraction)


def extract_layers(pairs: Pairs, comparison: Comparison, extraction: Extraction) -> dict[str, LoRAWeights]:
    """As ``extract``, of the layers of any model."""
    modules, same = {}, 0
    for name, (original, tuned) in tqdm(pairs.items(), desc="modules", mininterval=1):
        difference = comparison.difference(original, tuned)
        if not bool(torch.isfinite(difference).all()):
            raise UserError(f"{tuned.source.checkpoint.label}: {tuned.tensor} holds numbers that are not finite.")
        if bool(difference.any()):
            modules[name] = extraction.of(difference)
        else:
            same += 1
    if not modules:
        raise UserError("the two models do not differ in any layer that LoRA can change; there is nothing to extract.")
    if same:
        say(f"{same} layers are the same in both models and are left out")
    return modules


def _changed_encoders(text: Pairs, comparison: Comparison, min_diff: float) -> Pairs:
    """All text encoder layers, or none when no weight differs by more than ``min_diff``."""
    largest = max((_largest(comparison.difference(*pair)) for pair in text.values()), default=0.0)
    if largest > min_diff:
        say(f"text encoders differ by up to {largest:g}, more than --min_diff {min_diff:g}")
        return text
    if largest:
        warn(
            f"text encoders differ by {largest:g} at most, not more than --min_diff {min_diff:g}; only the U-Net is"
            " extracted"
        )
    else:
        say("text encoders are the same; only the U-Net is extracted")
    return {}


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
