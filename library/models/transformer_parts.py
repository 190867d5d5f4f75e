"""What the transformers of several families are made of: rotary positions, sinusoids, norms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_FLOAT16 = 65504.0


def rope_rotations(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Rotary positions of ``ids`` [batch, tokens, axes] as unit complex numbers [batch, 1, tokens, head_dim / 2].

    Angles are computed in float64, because float32 loses high positions; the result is complex64.
    """
    positions = ids.double()
    angles = [
        positions[..., axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    joined = torch.cat(angles, dim=-1).unsqueeze(1)
    return torch.polar(torch.ones_like(joined), joined).to(torch.complex64)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent pairs of ``x`` [batch, heads, tokens, head_dim], in float32.

    As a complex product: several times as fast as products and sums of the pairs' halves, with the same result.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Embed ``values`` [batch] as [batch, dim] float32: cosines first, then sines; periods from 2 pi to 20000 pi."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension times ``weight``, computed in float32, in the dtype of ``x``."""
    if x.dtype == weight.dtype:  # torch computes it in float32 by itself, and keeps no copy for the backward pass
        return F.rms_norm(x, weight.shape, weight, eps=eps).to(x.dtype)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps=eps).to(x.dtype)


def clip_float16(x: Tensor) -> Tensor:
    """Keep float16 finite: the streams of the last blocks can pass its largest number."""
    return x.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16) if x.dtype == torch.float16 else x
