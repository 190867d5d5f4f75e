"""Attention is the same formula over every backend; the packages are stood in for by their documented functions."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import get_args

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.models.attention import WITHOUT_BACKWARD, AttentionBackend, attention, require_backend

BACKENDS = get_args(AttentionBackend)
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]]).bool()


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64, from [batch, heads, tokens, D] to the same; heads of queries share those of keys and values."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(shared, dim=1) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).to(query.dtype)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """``formula`` for [batch, tokens, heads, D], as flash_attn and xformers have it."""
    return formula(*(t.transpose(1, 2) for t in (query, key, value)), mask).transpose(1, 2)


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
) -> Tensor:
    """The same for [tokens of all items, heads, D] and where each item begins, as flash_attn and sageattention do."""
    assert query_starts.dtype == key_starts.dtype == torch.int32 and key_starts[-1] == len(key) == len(value)
    rows, spans = (
        [],
        zip(query_starts.tolist(), query_starts[1:].tolist(), key_starts.tolist(), key_starts[1:].tolist()),
    )
    for start, stop, key_start, key_stop in spans:
        assert stop - start <= most_queries and key_stop - key_start <= most_keys
        parts = (query[start:stop], key[key_start:key_stop], value[key_start:key_stop])
        rows.append(dense(*(part[None] for part in parts))[0])
    return torch.cat(rows)


def sageattn(query: Tensor, key: Tensor, value: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
    assert tensor_layout == "HND" and not is_causal
    return formula(query, key, value)


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None) -> Tensor:
    assert query.shape[2] == key.shape[2], "xformers has no shared heads without a fifth dimension"
    if attn_bias is None:
        return dense(query, key, value)
    assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    assert attn_bias.stride(0) % 8 == 0 and attn_bias.dtype == query.dtype
    return dense(query, key, value, attn_bias == 0)


@pytest.fixture
def packages(monkeypatch) -> None:
    """The packages of the backends, as far as they are used."""
    functions = {
        "flash_attn": {"flash_attn_func": dense, "flash_attn_varlen_func": packed},
        "sageattention": {"sageattn": sageattn, "sageattn_varlen": packed},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
    }
    for name, members in functions.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def tensors(heads: int, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, 5, 8, generator=random) for count in (heads, heads // shared, heads // shared))


@pytest.mark.parametrize("shared", [1, 3, 6], ids=lambda shared: f"{shared} share a key")
@pytest.mark.parametrize("mask", [None, MASK], ids=["every key", "some keys"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_the_formula_and_so_are_its_gradients(packages, backend, mask, shared):
    inputs = tensors(6, shared)
    is_trained = backend not in WITHOUT_BACKWARD
    for each in inputs:
        each.requires_grad_(is_trained)
    expected = formula(*inputs, None if mask is None else mask[:, None, None]).transpose(1, 2).flatten(2)
    actual = attention(*inputs, mask, backend)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    if is_trained:
        weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad((expected * weights).sum(), inputs)
        for ours, theirs in zip(torch.autograd.grad((actual * weights).sum(), inputs), wanted):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", WITHOUT_BACKWARD)
def test_a_backend_without_gradients_does_not_pass_for_one_that_has_them(packages, backend):
    query, key, value = tensors(2, 1)
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        attention(query, key, value, None, backend)
    with torch.no_grad():
        assert attention(query, key, value, None, backend).isfinite().all()


@pytest.mark.parametrize(
    ("backend", "package"), [("xformers", "xformers"), ("flash", "flash_attn"), ("sage", "sageattention")]
)
def test_a_package_that_is_missing_is_named(monkeypatch, backend, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f'"{backend}" needs the package {package}, which is not installed') as error:
        require_backend(backend)
    assert str(error.value).count("\n") == 0


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match='"sdpaa" is unknown.*sdpa'):
        require_backend("sdpaa")


def test_a_float_mask_is_refused():
    """It would be added to the scores, which is silently wrong."""
    query = torch.randn(1, 1, 2, 8)
    with pytest.raises(TypeError, match="boolean"):
        attention(query, query, query, torch.ones(1, 2))
