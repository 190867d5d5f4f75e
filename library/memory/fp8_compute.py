"""Products in 8 bits: fp8 weights are multiplied as they lie in memory, by activations rounded to fp8 on the way.

An input, or a gradient, gets one scale (its largest absolute value / 448), computed each time; ``torch._scaled_mm``
multiplies codes with codes, sums in float32 and applies both scales. Weights with a scale for each output channel are
scaled after the product, and before it in the gradient, where the outputs are summed over. Scales for blocks stand
inside the sum, so such weights are multiplied as elsewhere. What is computed differs from the product with the same
weight by the rounding of the activations: 2.6 % of its size for normal ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.errors import UserError
from library.memory.scaled import FP8, LARGEST, ScaledLinear

ALIGNMENT = 16
"""Sides of matrices that GPUs multiply in fp8 are multiples of it."""
FIRST_CAPABILITY = (8, 9)
"""NVIDIA's compute capability from which GPUs multiply in fp8."""


class FastScaledLinear(ScaledLinear):
    """A frozen ``nn.Linear`` with an fp8 weight whose products are in fp8 wherever shape, scales and dtype allow."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As of every ``StoredLinear``, with ``x`` rounded to fp8."""
        if not self._multiplies(x):
            return super().matmul(x, bias)
        codes, scale = in_fp8(x.reshape(-1, self.in_features))
        most = self.scale.amax()
        y = _product(codes, scale, self.codes.t(), most, x.dtype, use_fast_accum=True)
        if self.scale.dim() == 2:
            y.mul_((self.scale / most).t())
        if bias is not None:
            y.add_(bias)
        return y.view(*x.shape[:-1], self.out_features)

    def matmul_t(self, grad: Tensor) -> Tensor:
        """As of every ``StoredLinear``, with ``grad`` rounded to fp8."""
        if not self._multiplies(grad):
            return super().matmul_t(grad)
        rows, most = grad.reshape(-1, self.out_features), self.scale.amax()
        if self.scale.dim() == 2:
            rows = rows * (self.scale / most).t().to(grad.dtype)
        codes, scale = in_fp8(rows)
        columns = self.codes.t().contiguous().t()  # the order that the product wants
        product = _product(codes, scale, columns, most, grad.dtype, use_fast_accum=False)
        return product.view(*grad.shape[:-1], self.in_features)

    def _multiplies(self, x: Tensor) -> bool:
        """Whether a product with ``x`` can be in fp8."""
        sides = (self.in_features, self.out_features)
        is_aligned = all(side % ALIGNMENT == 0 for side in sides)
        return is_aligned and self.scale.dim() < 3 and x.dtype != torch.float64 and x.numel() > 0


def _product(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """``(a * scale_a) @ (b * scale_b)`` of codes ``a``, row after row, and ``b``, column after column."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=use_fast_accum)


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` [rows, n] and their scale (0-dim float32). What is not finite makes the scale so."""
    largest = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny * LARGEST[FP8]) / LARGEST[FP8]
    quotient = torch.div(x, scale.view(1, 1), out=torch.empty_like(x))  # with dimensions, it is divided in float32
    return quotient.to(FP8), scale


def require_fp8_products(device: torch.device) -> None:
    """Raises UserError for a device that does not multiply in fp8."""
    name = f"this run is on the device {device.type}"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY:
            return
        name = f"{torch.cuda.get_device_name(device)} does not"
    raise UserError(
        "--fp8_fast needs an NVIDIA GPU that multiplies in fp8 (compute capability 8.9 or above: RTX 40 series, H100 "
        f"and later), and {name}; leave it out."
    )
