"""What one training step receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Size = tuple[int, int]


@dataclass
class Batch:
    """B samples of one bucket, on the CPU until ``to`` is called. Either ``images`` or ``latents`` is there."""

    item_ids: list[int]
    """A stable id of each (image, repeat) in the group."""
    image_keys: list[str]
    captions: list[str]
    images: Tensor | None
    """[B, 3, H, W] float32 in -1..1."""
    latents: Tensor | None
    """[B, C, h, w] float32, from the cache."""
    text: dict[str, Tensor] | None
    """Cached text encoder outputs, batch first; shorter ones are padded with zeros at the end."""
    alpha_masks: Tensor | None
    """[B, H, W] float32 in 0..1 at pixel size; None when no sample has one."""
    conditioning_images: Tensor | None
    """[B, 3, H, W] float32 in -1..1, in place with the images."""
    loss_weights: Tensor
    """[B] float32: 1, or the prior loss weight of regularisation images; 0 for padding."""
    group_size: int
    """Real samples in the global batch, over all processes."""
    original_sizes: list[Size]
    """(height, width) of the image files."""
    crop_top_lefts: list[tuple[float, float]]
    """(top, left) of the crop."""
    target_sizes: list[Size]
    """(height, width) in pixels."""
    flipped: list[bool]
    network_multipliers: list[float]
    """Strength of the network for each sample, rounded as float32; numbers, so that no step reads a tensor for it."""
    custom_attributes: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.item_ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """A batch with every tensor on ``device`` (dtypes stay)."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A batch in page-locked memory, from which copies to a GPU do not wait."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, move: Any) -> Batch:
        import torch

        changed: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, torch.Tensor):
                changed[entry.name] = move(value)
        if self.text is not None:
            changed["text"] = {name: move(tensor) for name, tensor in self.text.items()}
        return replace(self, **changed)


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack along a new first dimension; a tensor with a shorter first dimension gets zeros at its end."""
    import torch

    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    longest = max(tensor.shape[0] for tensor in tensors)
    padded = tensors[0].new_zeros((len(tensors), longest, *tensors[0].shape[1:]))
    for row, tensor in zip(padded, tensors):
        row[: tensor.shape[0]] = tensor
    return padded


def stack_text(entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The text encoder outputs of a batch, each array batch first."""
    return {name: stack_padded([entry[name] for entry in entries]) for name in entries[0]}


def stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """[B, H, W] with ones for samples that have no mask; None when none has."""
    import torch

    known = [mask for mask in masks if mask is not None]
    if not known:
        return None
    return torch.stack([torch.ones_like(known[0]) if mask is None else mask for mask in masks])
