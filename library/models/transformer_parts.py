"""What the transformers of several families are made of: rotary positions, sinusoids, norms, embedders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

LARGEST_FLOAT16 = 65504.0
KEPT_GRIDS = 8
"""Sizes of images whose rotations are kept."""


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


class GridRotations:
    """Rotary positions (row, column) of the tokens of images; those of the last sizes are kept."""

    def __init__(self, axes_dims: tuple[int, ...], theta: float):
        self.axes_dims, self.theta = axes_dims, theta
        self.kept: dict[tuple[int, int], Tensor] = {}
        """Rotations by rows and columns, the newest last."""

    def of(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Unit complex numbers [rows * columns, pairs] of an image's tokens, row by row."""
        kept = self.kept.pop((rows, columns), None)
        if kept is None or kept.device != device:
            row, column = (torch.arange(side, device=device) for side in (rows, columns))
            kept = rope_rotations(torch.cartesian_prod(row, column)[None], self.axes_dims, self.theta)[0, 0]
        if not isinstance(kept, FakeTensor):
            self.kept[rows, columns] = kept
            for oldest in list(self.kept)[:-KEPT_GRIDS]:
                del self.kept[oldest]
        return kept


def token_lengths(mask: Tensor) -> list[int]:
    """How many tokens each text has, by its mask [B, L], which is read here; of a simulation's mask, L."""
    if isinstance(mask, FakeTensor):  # it has no values, and stands for the longest texts
        return [mask.shape[1]] * mask.shape[0]
    return mask.bool().sum(dim=1).tolist()


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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def split_heads(qkv: Tensor, heads: int, query_norm: nn.Module, key_norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Joined q, k, v [B, tokens, 3 * hidden] -> three [B, heads, tokens, head width], queries and keys normed."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return query_norm(query), key_norm(key), value


class TimeEmbedder(nn.Module):
    """The time [B] as a vector [B, dim]; its sinusoids are made in float32 of the time as it is."""

    def __init__(self, frequency_dim: int, dim: int):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(timesteps, self.frequency_dim).to(dtype))


def modulations(linear: nn.Module, vec: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` modulation vectors, each [B, 1, hidden], by ``linear`` of the conditioning vector [B, hidden]."""
    return linear(F.silu(vec))[:, None, :].chunk(count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) * layer_norm(x) + shift``; x [B, tokens, hidden], shift and scale [B, 1, hidden]."""
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=1e-6))


class LastLayer(nn.Module):
    """Modulated norm and projection, [B, tokens, hidden] -> [B, tokens, out channels]."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
