"""Sums and low-rank approximations of LoRA modules, for every model family.

A module adds ``alpha / rank * up @ down`` to its layer's weight; of a convolution, the kernel counts as part of the
input: ``down`` [rank, in, kh, kw] is the matrix [rank, in * kh * kw]. Everything is computed from the two small factors
in float64 where the device has it, so that results are exact to the rounding of the file they are saved in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.adapters.lora_file import LoRAWeights, decomposed


class SingularParts(NamedTuple):
    """A matrix [m, n] as ``u @ diag(s) @ vh``: ``u`` [m, k], ``s`` [k] from the largest down, ``vh`` [k, n]."""

    u: Tensor
    s: Tensor
    vh: Tensor


class Retention(NamedTuple):
    """What is left of a matrix after truncation; shares in 0..1."""

    sum: float
    """Share of the sum of singular values."""
    norm: float
    """Share of the Frobenius norm."""
    ratio: float
    """Largest singular value through the smallest that is kept."""


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def strength(weights: LoRAWeights) -> float:
    """alpha / rank: the factor on ``up @ down``."""
    return weights.alpha / len(weights.down)


def layer_shape(down: Sequence[int], up: Sequence[int]) -> tuple[int, ...]:
    """The shape [out, in] or [out, in, kh, kw] of a layer whose LoRA matrices have these shapes."""
    return (up[0], *down[1:])


def matrices(weights: LoRAWeights) -> tuple[Tensor, Tensor]:
    """``down`` [rank, n] and ``up`` [m, rank] in the working dtype."""
    dtype = working_dtype(weights.down.device)
    return weights.down.to(dtype).flatten(1), weights.up.to(dtype).flatten(1)


def difference(weights: LoRAWeights, ratio: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``ratio * alpha / rank * up @ down`` in the shape of the layer's weight, summed in ``dtype``."""
    down, up = weights.down.to(dtype).flatten(1), weights.up.to(dtype).flatten(1)
    return (up @ down).mul_(ratio * strength(weights)).reshape(layer_shape(weights.down.shape, weights.up.shape))


def added(weight: Tensor, weights: LoRAWeights, ratio: float = 1.0) -> Tensor:
    """What a module adds to a ``weight`` of float32 or more: its difference, or what DoRA makes of that, times
    ``ratio``."""
    whole = difference(weights, dtype=weight.dtype).reshape(weight.shape)
    if weights.magnitudes:
        whole = decomposed(weight + whole, weights.magnitudes) - weight
    return whole.mul_(ratio)


def concatenated(parts: Sequence[tuple[LoRAWeights, float]]) -> LoRAWeights:
    """The sum of modules of one layer, each times its ratio, with their ranks side by side.

    The strength (alpha / rank) of the first module stays; where another's or a ratio differs, the square root of the
    quotient goes into both factors of that module and a minus sign into its up. Numbers that need no factor are not
    touched. Layers must agree up to a kernel of 1x1; the result has the first module's form. Raises ValueError else.
    """
    first = parts[0][0]
    common = next((strength(weights) for weights, _ in parts if strength(weights)), 1.0)
    downs, ups = [], []
    for weights, ratio in parts:
        down, up = matrices(weights)
        if (len(up), down.shape[1]) != (len(first.up), first.down[0].numel()):
            raise ValueError(f"layers of different sizes: {list(up.shape)} @ {list(down.shape)}")
        factor = ratio * strength(weights) / common
        downs.append(down * math.sqrt(abs(factor)))
        ups.append(up * math.copysign(math.sqrt(abs(factor)), factor))
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    rank = len(down)
    return LoRAWeights(
        down.reshape(rank, *first.down.shape[1:]),
        up.reshape(len(up), rank, *first.up.shape[2:]),
        common * rank,
    )


def singular_parts(weights: LoRAWeights) -> SingularParts:
    """The singular values and vectors of ``up @ down``, without alpha; k is the smallest of rank, m and n.

    The product is never made: with QR of both factors, the decomposition is one of a [rank, rank] matrix.
    """
    down, up = matrices(weights)
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.t())
    u, s, vh = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    return SingularParts(left @ u, s, vh @ right.t())


def numerical_rank(weights: LoRAWeights, parts: SingularParts) -> int:
    """How many singular values of ``up @ down`` are more than rounding errors of the product; at least 1."""
    down, up = matrices(weights)
    noise = torch.finfo(parts.s.dtype).eps * max(len(up), down.shape[1]) * float(up.norm()) * float(down.norm())
    return max(int((parts.s > noise).sum()), 1)


def compacted(weights: LoRAWeights) -> LoRAWeights:
    """The same difference in the smallest rank that holds it, with the same strength."""
    parts = singular_parts(weights)
    return truncated(parts, numerical_rank(weights, parts), strength(weights), weights)


def truncated(parts: SingularParts, rank: int, strength: float, like: LoRAWeights) -> LoRAWeights:
    """The best approximation of rank ``rank`` (Eckart-Young), in the form of the tensors of ``like``.

    Both factors get the square root of the singular values, so that neither gets too small for float16.
    """
    root = parts.s[:rank].sqrt()
    return LoRAWeights(
        (root[:, None] * parts.vh[:rank]).reshape(-1, *like.down.shape[1:]),
        (parts.u[:, :rank] * root).reshape(len(parts.u), -1, *like.up.shape[2:]),
        strength * len(root),
    )


def extracted(difference: Tensor, rank: int, clamp_quantile: float = 1.0) -> LoRAWeights:
    """A LoRA of rank ``rank`` (or the layer's own, where it is smaller) for ``difference`` [out, in(, kh, kw)].

    ``up`` = U S, ``down`` = V^T, alpha = rank. Values of both beyond the quantile of all of them are cut off (see
    ``clamp_limit``); 1 cuts nothing. The field's way of taming outliers, after cloneofsimo/lora.
    """
    out, *rest = difference.shape
    return clamped_factors(largest_parts(difference.reshape(out, -1), rank), rank, tuple(rest), clamp_quantile)


def largest_parts(matrix: Tensor, rank: int) -> SingularParts:
    """The ``rank`` largest singular values of ``matrix`` [m, n] and their vectors, in its dtype.

    They come from the eigenvectors of its smaller Gram matrix, in float64 where the device has it. That takes a third
    of the time of a decomposition in float32 and is more exact: what is left out is the least that can be, to 1e-7 of
    the largest value, because rounding in float64 acts on the squares of the values. At full rank nothing is left out.
    """
    rank = min(rank, *matrix.shape)
    if working_dtype(matrix.device) != torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return SingularParts(u[:, :rank], s[:rank], vh[:rank])
    exact = matrix.double()
    is_wide = len(exact) < exact.shape[1]
    exact = exact.t() if is_wide else exact
    v = largest_eigenvectors(exact.t() @ exact, rank)
    us = exact @ v
    s = us.norm(dim=0)
    u = us / s.clamp_min(torch.finfo(s.dtype).tiny)
    parts = SingularParts(v, s, u.t()) if is_wide else SingularParts(u, s, v.t())
    return SingularParts(*(part.to(matrix.dtype) for part in parts))


def largest_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """The eigenvectors [n, count] of a symmetric matrix with the largest eigenvalues, from the largest down."""
    size = len(matrix)
    if matrix.device.type != "cpu":
        return torch.linalg.eigh(matrix).eigenvectors[:, size - count :].flip(1)
    from scipy.linalg import eigh

    _, vectors = eigh(matrix.numpy(), subset_by_index=(size - count, size - 1))
    return torch.from_numpy(vectors).flip(1)


def clamped_factors(parts: SingularParts, rank: int, rest: tuple[int, ...], clamp_quantile: float) -> LoRAWeights:
    """The factors that ``extracted`` describes, for a layer with the weight [out, \\*rest]."""
    up, down = parts.u[:, :rank] * parts.s[:rank], parts.vh[:rank]
    limit = clamp_limit(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
    up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    rank = len(down)
    return LoRAWeights(down.reshape(rank, *rest), up.reshape(len(up), rank, *(1 for _ in rest[1:])), float(rank))


def clamp_limit(values: Tensor, quantile: float) -> float:
    """The ``quantile`` (0.5..1) of ``values`` and their negatives taken together, linear between neighbours.

    Signs of singular vectors are arbitrary, so the limit must not depend on them.
    """
    sizes = values.abs().flatten()
    position = max(2 * quantile - 1, 0.0) * (sizes.numel() - 1)
    below = math.floor(position)
    low = float(sizes.kthvalue(below + 1).values)
    if below == position:
        return low
    return low + (position - below) * (float(sizes.kthvalue(below + 2).values) - low)


# --- ranks chosen by the singular values ------------------------------------------------------------------------------


def rank_by_ratio(s: Tensor, ratio: float) -> int:
    """How many of ``s`` are larger than the largest divided by ``ratio``."""
    return int((s > s[0] / ratio).sum())


def rank_by_sum(s: Tensor, share: float) -> int:
    """The smallest rank whose singular values add up to ``share`` (0..1) of all."""
    sums = s.cumsum(0)
    return int((sums / sums[-1] < share).sum()) + 1


def rank_by_norm(s: Tensor, share: float) -> int:
    """The smallest rank that keeps ``share`` (0..1) of the Frobenius norm."""
    squares = s.square().cumsum(0)
    return int(((squares / squares[-1]).sqrt() < share).sum()) + 1


RANK_METHODS: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": rank_by_ratio,
    "sv_cumulative": rank_by_sum,
    "sv_fro": rank_by_norm,
}


def dynamic_rank(s: Tensor, method: str, parameter: float, largest: int) -> int:
    """The rank that ``method`` finds in ``s``: at least 1, at most ``largest`` and the number of values.

    kohya-ss/sd-scripts kept one value more than its criteria ask for.
    """
    if not s[0]:
        return 1
    return max(1, min(RANK_METHODS[method](s, parameter), largest, len(s)))


def retention(s: Tensor, rank: int) -> Retention:
    """What the first ``rank`` singular values hold of all; everything of a matrix of zeros."""
    if not s[0]:
        return Retention(1.0, 1.0, 1.0)
    kept = s[:rank]
    smallest = float(kept[-1])
    ratio = float(s[0]) / smallest if smallest else math.inf
    return Retention(float(kept.sum() / s.sum()), float(kept.norm() / s.norm()), ratio)


# --- files ------------------------------------------------------------------------------------------------------------


def with_storable_alpha(weights: LoRAWeights, dtype: torch.dtype) -> LoRAWeights:
    """The same difference with an alpha that ``dtype`` holds exactly; what rounding took is given to ``up``."""
    stored = float(torch.tensor(weights.alpha, dtype=torch.float64).to(dtype))
    if stored == weights.alpha:
        return weights
    if not math.isfinite(stored) or not stored:
        stored = float(len(weights.down))
    return LoRAWeights(weights.down, weights.up * (weights.alpha / stored), stored)
