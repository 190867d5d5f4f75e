"""Frozen Linear layers whose weights are stored in 8 bits (float8 e4m3fn) with one scale per layer.

A layer computes with its weight in the activations' dtype, materialised for each product and released at once, in
the backward pass too; so a frozen model takes half the memory of bfloat16. The scale (largest absolute weight / 448)
keeps small weights from falling below the format's smallest number: a plain cast of weights with a deviation of 0.002
turns more than a third of them into 0.

Format: https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.stored_linear import StoredLinear

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in 8 bits: ``codes`` times ``scale`` (0-dim float32)."""

    codes: Tensor
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, in memory of its own; the product is rounded once."""
        return self.codes.to(dtype).mul_(self.scale)  # codes have four significant bits: the cast loses none


def quantise(weight: Tensor) -> ScaledWeight:
    """``weight`` in 8 bits; one of zeros only keeps the scale 1. Not a number and infinity raise ValueError."""
    largest = weight.detach().abs().amax().float() if weight.numel() else torch.zeros(())
    if not torch.isfinite(largest):
        raise ValueError("the weight has values that are not finite")
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    codes = (weight.detach().float() / scale).clamp_(-LARGEST, LARGEST).to(FP8)
    return ScaledWeight(codes, scale)


@dataclass(frozen=True)
class BlocksInFp8:
    """A dtype for a whole model: the Linear weights of its blocks in 8 bits, everything else in ``compute``."""

    compute: torch.dtype


StorageDtype = torch.dtype | BlocksInFp8


class Fp8Linear(StoredLinear):
    """A frozen ``nn.Linear`` whose weight is stored in 8 bits.

    ``weight`` is a property: the weight as the layer computes with it, computed at each access. ``set_weight``
    replaces it.
    """

    codes: Tensor
    scale: Tensor
    compute_dtype: torch.dtype

    @property
    def stored_weight(self) -> ScaledWeight:
        """The weight as it lies in memory."""
        return ScaledWeight(self.codes, self.scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] in ``compute_dtype``."""
        return self.stored_weight.to(self.compute_dtype)

    def set_weight(self, weight: Tensor | ScaledWeight) -> None:
        """Store another weight of the same shape."""
        stored = weight if isinstance(weight, ScaledWeight) else quantise(weight)
        self.codes = stored.codes.to(self.codes.device)
        self.scale = stored.scale.to(self.codes.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves between devices move the codes; a cast to another dtype leaves them as they are."""
        before = self.codes, self.scale
        super()._apply(fn, recurse)
        device = self.codes.device
        self.codes, self.scale = (tensor.to(device) for tensor in before)
        if self.bias is not None:
            self.compute_dtype = self.bias.dtype
        return self


def block_linears(module: nn.Module, keep: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The Linear layers inside the module's lists of blocks, by name, without those below a name in ``keep``.

    Everything around the blocks (embedders, final layers) stays as it is: little memory, much influence.
    """
    lists = [name + "." for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and any(name.startswith(prefix) for prefix in lists)
        and not any(name == kept or name.startswith(kept + ".") for kept in keep)
    }


def store_in_fp8(layer: nn.Linear, weight: ScaledWeight, compute_dtype: torch.dtype) -> None:
    """Turn ``layer`` into an ``Fp8Linear`` with ``weight``, in place, so that whoever holds the layer keeps it.

    Raises ValueError for a layer that is not exactly an ``nn.Linear``, or a weight of another shape.
    """
    if type(layer) is not nn.Linear:
        raise ValueError(f"a {type(layer).__name__} cannot be stored in 8 bits")
    if weight.codes.shape != layer.weight.shape:
        raise ValueError(f"the weight has the shape {tuple(weight.codes.shape)}, the layer {tuple(layer.weight.shape)}")
    del layer.weight
    layer.__class__ = Fp8Linear
    assert isinstance(layer, Fp8Linear)
    layer.compute_dtype = compute_dtype
    layer.register_buffer("codes", weight.codes, persistent=False)
    layer.register_buffer("scale", weight.scale.to(weight.codes.device), persistent=False)
