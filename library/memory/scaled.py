"""Frozen Linear weights in 8 bits: codes (float8 e4m3fn or int8) times scales.

A scale is for a whole weight, for an output channel, or for 64 inputs of an output channel: the largest absolute weight
becomes the largest code. That keeps small weights from falling below the smallest code: a plain cast to e4m3fn of
weights with a deviation of 0.002 turns more than a third of them into 0. Scales for 64 inputs are bfloat16, as
musubi-tuner has them for bfloat16 weights, the others float32; int8 has a scale for each output channel.

Formats: https://arxiv.org/abs/2209.05433, https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from library.memory.storage import Granularity
from library.memory.stored_linear import StoredLinear

FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, torch.int8: 127.0}
BLOCK = 64


@dataclass(frozen=True)
class ScaledWeight:
    """A weight [out, in] in 8 bits: ``codes`` [out, in] times ``scale``.

    The scale is 0-dim for the whole weight, [out, 1] for each output, or [out, n, 1] for each n-th of its inputs.
    """

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.codes.shape

    @property
    def granularity(self) -> Granularity:
        """What shares a scale."""
        return granularity_of(self.scale)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, in memory of its own; the product is rounded once."""
        weight = self.codes.to(dtype)  # codes have at most eight significant bits: the cast loses none
        # Beside a tensor of 16 bits, kernels of GPUs read a 0-dim scale as 16 bits, but not one with dimensions.
        scale = self.scale if weight.device.type == "cpu" or self.scale.dim() else self.scale.view(1, 1)
        by_scale(weight, scale).mul_(scale)
        return weight


def granularity_of(scale: Tensor) -> Granularity:
    """What shares one of these scales."""
    return "block" if scale.dim() == 3 else "channel" if scale.dim() == 2 else "tensor"


def by_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """A view of ``weight`` [out, in] that can be multiplied by ``scale``."""
    return weight.unflatten(1, (scale.shape[1], -1)) if scale.dim() == 3 else weight


def empty_scaled(
    shape: tuple[int, ...], device: torch.device | str, codes: torch.dtype = FP8, granularity: Granularity = "tensor"
) -> ScaledWeight:
    """What ``quantise`` would give for a weight of that shape, with undefined values."""
    scales = {"tensor": (), "channel": (shape[0], 1), "block": (shape[0], shape[1] // BLOCK, 1)}
    possible = _possible(shape, granularity)
    dtype = torch.bfloat16 if possible == "block" else torch.float32
    scale = torch.empty(scales[possible], dtype=dtype, device=device)
    return ScaledWeight(torch.empty(shape, dtype=codes, device=device), scale)


def _possible(shape: tuple[int, ...], granularity: Granularity) -> Granularity:
    """Channels instead of blocks that do not divide the inputs, as musubi-tuner has it."""
    return "channel" if granularity == "block" and shape[1] % BLOCK else granularity


def quantise(weight: Tensor, codes: torch.dtype = FP8, granularity: Granularity = "tensor") -> ScaledWeight:
    """``weight`` [out, in] in 8 bits; where all are zero the scale is 1. Blocks that do not fit become channels.

    Not a number and infinity raise ValueError.
    """
    weight, granularity = weight.detach(), _possible(weight.shape, granularity)
    if granularity == "tensor":
        least, most = torch.aminmax(weight) if weight.numel() else torch.zeros(2)
    else:
        blocks = weight.unflatten(1, (-1, BLOCK)) if granularity == "block" else weight
        least, most = torch.aminmax(blocks, dim=-1, keepdim=True)
    largest = torch.maximum(-least, most).float()
    if not torch.isfinite(largest).all():
        raise ValueError("the weight has values that are not finite")
    scale = largest / LARGEST[codes]
    scale = scale.bfloat16() if granularity == "block" else scale
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quotient = weight.to(torch.float32, copy=True)  # the only copy: weights may be large
    by_scale(quotient, scale).div_(scale)
    if codes == torch.int8:
        quotient.round_()
    return ScaledWeight(quotient.clamp_(-LARGEST[codes], LARGEST[codes]).to(codes), scale)


class ScaledLinear(StoredLinear):
    """A frozen ``nn.Linear`` whose weight is a ``ScaledWeight``."""

    bulk: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Tensor
    scale: Tensor

    @property
    def stored_weight(self) -> ScaledWeight:
        """The weight as it lies in memory."""
        return ScaledWeight(self.codes, self.scale)

    def quantise(self, weight: Tensor) -> ScaledWeight:
        """``weight`` with as many scales as the present one."""
        return quantise(weight, self.codes.dtype, granularity_of(self.scale))
