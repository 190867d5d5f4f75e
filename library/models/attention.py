"""One attention function for every model, over every backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from library.console import warn
from library.errors import UserError, did_you_mean

AttentionBackend = Literal["sdpa", "split", "xformers", "flash", "sage"]
"""``sdpa``: torch's fused kernels. ``split``: the same, one batch item at a time, each on its own real length, which
needs least memory. ``xformers``, ``flash``, ``sage``: the packages of that name."""

PACKAGES = {"xformers": "xformers", "flash": "flash_attn", "sage": "sageattention"}
WITHOUT_BACKWARD: frozenset[AttentionBackend] = frozenset({"sage"})
"""Backends that give no gradients: they can draw images, but cannot train."""


def require_backend(backend: str) -> None:
    """Raise UserError when ``backend`` is unknown or its package isn't installed."""
    if backend not in get_args(AttentionBackend):
        known = get_args(AttentionBackend)
        raise UserError(
            f'Attention backend "{backend}" is unknown; known are {", ".join(known)}.{did_you_mean(backend, known)}'
        )
    package = PACKAGES.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f'Attention backend "{backend}" needs the package {package}, which is not installed; '
            "install it or use torch's own attention (sdpa)."
        )


def or_torch(backend: AttentionBackend, option: str) -> AttentionBackend:
    """``backend``, or torch's own, with a warning that names ``option``, where its package isn't installed."""
    package = PACKAGES.get(backend)
    if package is None or importlib.util.find_spec(package) is not None:
        return backend
    warn(f"{option}: the package {package} is not installed; attention is PyTorch's own (--sdpa).")
    return "sdpa"


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, backend: AttentionBackend = "sdpa"
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V.

    ``query`` [batch, heads, queries, D], ``key`` and ``value`` [batch, heads or a part of them, keys, D]: of fewer
    heads, each is shared by as many neighbouring heads of queries. ``key_mask`` boolean [batch, keys], True where a key
    may be attended to (every row needs at least one). Returns [batch, queries, heads * D]. Raises TypeError for a mask
    that isn't boolean, and RuntimeError where a backend ``WITHOUT_BACKWARD`` would need one.
    """
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError("key_mask must be boolean: a float mask would be added to the scores")
    if backend == "split":
        out = _split(query, key, value, key_mask)
    elif backend == "xformers":
        out = _xformers(query, key, value, key_mask)
    elif backend == "flash":
        out = _flash(query, key, value, key_mask)
    elif backend == "sage":
        out = _sage(query, key, value, key_mask)
    else:
        out = _sdpa(query, key, value, None if key_mask is None else key_mask[:, None, None, :])
    return out.transpose(1, 2).flatten(2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's own; ``mask`` [batch, 1, 1, keys]."""
    groups = query.shape[1] // key.shape[1]
    out = F.scaled_dot_product_attention(_as_queries(query, groups), key, value, attn_mask=mask)
    return _as_heads(out, groups)


def _as_queries(query: Tensor, groups: int) -> Tensor:
    """[batch, heads, queries, D] -> [batch, heads / groups, groups * queries, D].

    Heads that share a key become one head with more queries, which is the same to a kernel. torch's own way
    (``enable_gqa``) would hold all scores wherever it has no fused kernel for it: on a GPU with a mask, or in float32.
    """
    return query if groups == 1 else query.unflatten(1, (-1, groups)).flatten(2, 3)


def _as_heads(out: Tensor, groups: int) -> Tensor:
    """The inverse of ``_as_queries``."""
    return out if groups == 1 else out.unflatten(2, (groups, -1)).flatten(1, 2)


def _split(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """One item at a time; masked keys are left out, so that the fused kernels without masks do the work."""
    rows = []
    for item in range(len(query)):
        item_key, item_value = key[item : item + 1], value[item : item + 1]
        if key_mask is not None:
            kept = key_mask[item].nonzero().squeeze(1)
            item_key, item_value = item_key[:, :, kept], item_value[:, :, kept]
        rows.append(_sdpa(query[item : item + 1], item_key, item_value))
    return torch.cat(rows)


def _xformers(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    groups = query.shape[1] // key.shape[1]
    query = _as_queries(query, groups)
    bias = None
    if key_mask is not None:
        batch, heads, queries, keys = *query.shape[:3], key.shape[2]
        # xformers wants the rows of a bias aligned to 8 elements, and the bias expanded rather than broadcast.
        aligned = torch.zeros(batch, 1, 1, -(-keys // 8) * 8, dtype=query.dtype, device=query.device)
        aligned[..., :keys].masked_fill_(~key_mask[:, None, None, :], float("-inf"))
        bias = aligned[..., :keys].expand(batch, heads, queries, keys)
    out = memory_efficient_attention(*(t.transpose(1, 2) for t in (query, key, value)), attn_bias=bias)
    return _as_heads(out.transpose(1, 2), groups)


def _flash(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if key_mask is None:
        return flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)
    return _without_masked_keys(flash_attn_varlen_func, query, key, value, key_mask)


def _sage(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from sageattention import sageattn, sageattn_varlen

    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise RuntimeError("sageattention has no backward pass")
    if key_mask is None:
        return sageattn(query, key, value, tensor_layout="HND")
    return _without_masked_keys(sageattn_varlen, query, key, value, key_mask)


def _without_masked_keys(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor
) -> Tensor:
    """By a ``kernel`` that takes the tokens of all items as one sequence, with the places where items begin."""
    batch, heads, queries, dim = query.shape
    kept = key_mask.flatten().nonzero().squeeze(1)
    lengths = key_mask.sum(1, dtype=torch.int32)
    key_starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    query_starts = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=query.device)
    packed_query, packed_key, packed_value = (
        t.transpose(1, 2).reshape(-1, t.shape[1], dim) for t in (query, key, value)
    )
    out = kernel(
        packed_query,
        packed_key[kept],
        packed_value[kept],
        query_starts,
        key_starts,
        queries,
        int(lengths.max()),
    )
    return out.reshape(batch, queries, heads, dim).transpose(1, 2)
