"""On a CUDA device: attention with shared heads of keys is the formula, and holds no table of scores."""

from __future__ import annotations

import pytest
import torch

from library.models.attention import attention
from tests.models.test_attention import formula

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_share_keys_need_no_scores_in_memory(dtype, masked):
    heads, kv_heads, tokens, width = 24, 8, 2048, 96
    random = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(2, count, tokens, width, generator=random, device="cuda", dtype=dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    mask = (torch.arange(tokens, device="cuda") < torch.tensor([[100], [tokens]], device="cuda")) if masked else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(query, key, value, mask)
    out.float().square().mean().backward()
    scores = 2 * heads * tokens * tokens * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before < scores
    with torch.no_grad():
        expected = formula(query, key, value, None if mask is None else mask[:, None, None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
