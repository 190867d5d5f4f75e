"""LoRA files merged into a model's own file: W + ratio * alpha / rank * up @ down, one tensor at a time.

The file keeps its layout, its other tensors and, unless told otherwise, every dtype. Which tensor a LoRA module
belongs to is given as ``Layer``s by LoRA name; see ``stable_diffusion_layers``.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from library.checkpoints import PICKLE_SUFFIXES, Checkpoint, open_checkpoint
from library.errors import UserError
from library.files import temporary_path, writing
from library.models.loading import TensorSource
from library.safetensors_io import save_one_by_one
from networks.lora_tools.arithmetic import added, difference
from networks.lora_tools.merging import Ingredient
from networks.lora_tools.named_lora import without_1x1

WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


@dataclass(frozen=True)
class Layer:
    """A layer of a model: the tensor that is its weight, by its name in ``source``."""

    source: TensorSource
    tensor: str


@dataclass(frozen=True)
class Change:
    """A LoRA module's part in one tensor of a file."""

    ingredient: Ingredient
    name: str
    layer: Layer
    before: tuple[Change, ...] = ()
    """The parts of other files that the layer's weight got before, which DoRA's depends on."""

    def values(self, device: torch.device | str) -> Tensor:
        """What is added to the layer's weight, float32."""
        weights, ratio = self.ingredient.load(self.name, device), self.ingredient.ratio_of(self.name)
        if not weights.magnitudes:
            return difference(weights, ratio)
        weight = self.layer.source.load(self.layer.tensor, torch.float32, device)
        for change in self.before:
            weight = weight + change.values(device).reshape(weight.shape)
        return added(weight, weights, ratio)

    def parts(self, device: torch.device | str) -> list[tuple[str, slice, Tensor]]:
        """What is added, as (key, rows, float32 values)."""
        return self.layer.source.stored(self.layer.tensor, self.values(device))


Plan = dict[tuple[Path, str], list[Change]]
"""(file, key) -> what is added to that tensor."""


def plan_merge(ingredients: Sequence[Ingredient], layers: Mapping[str, Layer]) -> Plan:
    """What goes where. Raises UserError that lists modules without a layer or names one that does not fit its own."""
    plan: Plan = defaultdict(list)
    changes: dict[str, tuple[Change, ...]] = defaultdict(tuple)
    for ingredient in ingredients:
        unmatched = [own for name, own in ingredient.names.items() if name not in layers]
        if unmatched:
            raise UserError(
                f"{ingredient.lora.label}: {len(unmatched)} of {len(ingredient.names)} modules have no layer in this"
                f" model: {', '.join(unmatched)}."
            )
        for name, own in ingredient.names.items():
            layer = layers[name]
            _check_fit(ingredient, own, layer)
            if ingredient.ratio_of(name):
                change = Change(ingredient, name, layer, changes[name])
                changes[name] += (change,)
                for key in layer.source.origins[layer.tensor].keys:
                    plan[_file_of(layer.source.checkpoint, key), key].append(change)
    return plan


def _check_fit(ingredient: Ingredient, own: str, layer: Layer) -> None:
    shape, wanted = ingredient.lora.layer_shape(own), layer.source.shape(layer.tensor)
    if without_1x1(shape) != without_1x1(wanted):
        raise UserError(
            f"{ingredient.lora.label}: {own} is for a layer of shape {list(shape)}, but this model's is"
            f" {list(wanted)}; the LoRA was made for another model."
        )
    if any(layer.source.is_scaled(key) for key in layer.source.origins[layer.tensor].keys):
        raise UserError(
            f"{layer.source.checkpoint.label} holds scaled fp8 weights, which cannot be added to; merge into the"
            " float16, bfloat16 or float32 version."
        )


def _file_of(checkpoint: Checkpoint, key: str) -> Path:
    entries = getattr(checkpoint, "entries", None)  # of safetensors files
    return entries[key].file if entries is not None else checkpoint.files[0]


@dataclass(frozen=True)
class MergeFormat:
    """How merged tensors are computed and stored."""

    precision: torch.dtype = torch.float32
    """What sums are rounded to."""
    save_dtype: torch.dtype | None = None
    """Of the floating-point weights in the file; None keeps each tensor's own."""
    device: torch.device | str = "cpu"

    def stored(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """The format in which a tensor of ``dtype`` is saved; ``betas`` and the like, in no module, keep theirs."""
        is_weight = dtype.is_floating_point and "." in key
        return self.save_dtype if self.save_dtype is not None and is_weight else dtype


def merge_into_file(path: Path, plan: Plan, save_to: Path, form: MergeFormat, metadata: Mapping[str, str]) -> None:
    """Write ``path``, of shards this one alone, with ``plan`` to ``save_to``; see ``merge_keys``."""
    checkpoint = open_checkpoint(path)
    keys = [key for key in checkpoint if _file_of(checkpoint, key) == path]
    merge_keys(checkpoint, keys, plan, save_to, form, metadata)


def merge_keys(
    checkpoint: Checkpoint,
    keys: Collection[str],
    plan: Plan,
    save_to: Path,
    form: MergeFormat,
    metadata: Mapping[str, str],
) -> None:
    """Write the tensors ``keys`` with ``plan`` as one file under the same keys; memory holds one tensor at a time.

    A ``.ckpt`` (or other pickle suffix) has no metadata and is put together in memory first. Appears complete or not at
    all.
    """
    changes = {key: change for key in keys if (change := plan.get((_file_of(checkpoint, key), key)))}
    with tqdm(total=len(changes), desc=checkpoint.path.name, mininterval=1) as progress:

        def load(key: str) -> Tensor:
            progress.update(key in changes)
            return _merged(checkpoint, key, changes.get(key, ()), form)

        if save_to.suffix.lower() in PICKLE_SUFFIXES:
            with writing(save_to) as file:
                torch.save({"state_dict": {key: load(key) for key in keys}}, file)
            return
        described = {
            key: torch.empty(checkpoint.shape(key), dtype=form.stored(key, checkpoint.dtype(key)), device="meta")
            for key in keys
        }
        save_one_by_one(described, load, save_to, metadata)


def _merged(checkpoint: Checkpoint, key: str, changes: Sequence[Change], form: MergeFormat) -> Tensor:
    dtype = form.stored(key, checkpoint.dtype(key))
    if not changes:
        return load_converted(checkpoint, key, dtype)
    total = widened(checkpoint.load(key, device=form.device))
    for change in changes:
        for part, rows, values in change.parts(form.device):
            if part == key:
                total[rows] += values
    return rounded(f'{checkpoint.label}: "{key}"', total, dtype, form.precision)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in a format that sums are computed in: float32, or float64 where it has that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rounded(place: str, total: Tensor, dtype: torch.dtype, precision: torch.dtype) -> Tensor:
    """``total`` through ``precision`` in ``dtype``, on the CPU; errors as of ``converted``."""
    return converted(place, converted(place, total, precision), dtype).cpu()


def load_converted(source: Checkpoint | TensorSource, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor in ``dtype``, of scaled fp8 without rounding on the way; errors as of ``converted``."""
    stored = source.dtype(name) if isinstance(source, Checkpoint) else source.stored_dtype(name)
    if stored == dtype or not _ends_early(dtype):
        return source.load(name, dtype, "cpu")
    checkpoint = source if isinstance(source, Checkpoint) else source.checkpoint
    return converted(f'{checkpoint.label}: "{name}"', source.load(name, torch.float32, "cpu"), dtype)


def converted(place: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``. Raises UserError, naming ``place``, where numbers pass its range, not clipping them."""
    if tensor.dtype != dtype and _ends_early(dtype) and tensor.numel():
        smallest, largest = widened(tensor).aminmax()
        size = max(float(largest), -float(smallest))
        if math.isfinite(size) and size > torch.finfo(dtype).max:
            raise UserError(f"{place} gets numbers too large for {dtype}; use --save_precision bf16 or float.")
    return tensor.to(dtype)


def _ends_early(dtype: torch.dtype) -> bool:
    """Whether a number that bfloat16 or float32 has can be too large for this format."""
    return dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max


def merge_into_folder(
    folder: Path, used: Collection[Path], plan: Plan, save_to: Path, form: MergeFormat, metadata: Mapping[str, str]
) -> None:
    """Write a Diffusers folder with ``plan`` to the new folder ``save_to``, which appears complete or not at all.

    ``used`` are the weight files that the model is read from. Weights beside them in another format (``.bin``,
    ``.fp16.safetensors``) are left out, since they would not be merged.
    """
    weight_folders = {file.parent for file in used}
    aside = temporary_path(save_to)
    try:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = aside / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in used:
                merge_into_file(file, plan, target, form, {**open_checkpoint(file).metadata, **metadata})
            elif file.parent not in weight_folders or not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, target)
        os.replace(aside, save_to)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
