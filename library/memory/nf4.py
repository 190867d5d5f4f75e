"""Frozen Linear weights in 4 bits: the normal floats (NF4) of bitsandbytes, with a scale for 64 weights.

Each group of 64 weights, row after row, is divided by its largest absolute weight; a code is the nearest of sixteen
numbers that are quantiles of a normal distribution. Scales are kept as bfloat16. bitsandbytes does the rounding and the
way back. Format: https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from library.lean_imports import lean_module
from library.memory.stored_linear import StoredLinear

BLOCK = 64
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that bitsandbytes takes and gives."""


@dataclass(frozen=True)
class Nf4Weight:
    """A weight [out, in]: ``codes`` uint8 [n, 1] with two in a byte, ``absmax`` bfloat16 [n] of 64 weights each."""

    codes: Tensor
    absmax: Tensor
    shape: torch.Size

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, in memory of its own."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # On a CPU, bitsandbytes compiles a function for rows of an odd length; one long row has an even one.
        shape = self.shape if self.shape[-1] % 2 == 0 else torch.Size((2 * self.codes.numel(),))
        state = QuantState(
            absmax=self.absmax.float(),
            shape=shape,
            dtype=dtype if dtype in COMPUTED else torch.float32,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        return dequantize_4bit(self.codes, state).flatten()[: self.shape.numel()].view(self.shape).to(dtype)


def _import_quietly() -> None:
    """Import bitsandbytes, which on some CPUs warns about a kernel that nothing here uses."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    lean_module("bitsandbytes")


def quantise(weight: Tensor) -> Nf4Weight:
    """``weight`` [out, in] in 4 bits. Not a number and infinity raise ValueError."""
    _import_quietly()
    from bitsandbytes.functional import quantize_4bit

    weight = weight.detach()
    weight = weight if weight.dtype in COMPUTED else weight.float()
    codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    if not (torch.isfinite(state.absmax).all() and torch.isfinite(weight).all()):
        raise ValueError("the weight has values that are not finite")
    return Nf4Weight(codes, state.absmax.bfloat16(), weight.shape)


def empty_nf4(shape: tuple[int, ...], device: torch.device | str) -> Nf4Weight:
    """What ``quantise`` would give for a weight of that shape, with undefined values."""
    _import_quietly()
    count = math.prod(shape)
    codes = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // BLOCK), dtype=torch.bfloat16, device=device)
    return Nf4Weight(codes, absmax, torch.Size(shape))


class Nf4Linear(StoredLinear):
    """A frozen ``nn.Linear`` whose weight is an ``Nf4Weight``."""

    bulk: ClassVar[tuple[str, ...]] = ("codes",)
    codes: Tensor
    absmax: Tensor

    @property
    def stored_weight(self) -> Nf4Weight:
        """The weight as it lies in memory."""
        return Nf4Weight(self.codes, self.absmax, torch.Size((self.out_features, self.in_features)))

    @property
    def format_name(self) -> str:
        """nf4."""
        return "nf4"

    def quantise(self, weight: Tensor) -> Nf4Weight:
        """``weight`` in 4 bits."""
        return quantise(weight)


def require_nf4(device: torch.device) -> None:
    """Raises UserError where bitsandbytes cannot work with 4 bits on the device."""
    try:
        tried = torch.zeros(1, BLOCK, dtype=torch.bfloat16, device=device)
        quantise(tried).to(torch.bfloat16)
    except ImportError as error:
        raise UserError(
            f"--base_format nf4 needs the package bitsandbytes, which cannot be imported: {error}."
        ) from None
    except (NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
        raise UserError(
            f"--base_format nf4: bitsandbytes has no 4-bit kernels for the device {device.type} "
            f"({_first_line(error)}); use --base_format int8 or --fp8_scaled."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100].rstrip(".")
