"""What transformers are made of has the exactness that it claims."""

from __future__ import annotations

import pytest
import torch

from library.models.transformer_parts import rms_norm

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("values", FLOATS)
def test_norms_are_computed_in_float32_and_rounded_once(values, weights, autocast):
    random = torch.Generator().manual_seed(0)
    x = (20 * torch.randn(3, 50, 48, generator=random)).to(values).requires_grad_()
    weight = (1 + 0.1 * torch.randn(48, generator=random)).to(weights)
    arriving = torch.randn(x.shape, generator=random).to(values)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = rms_norm(x, weight, 1e-5)
    (grad,) = torch.autograd.grad(out, x, arriving)
    exact = x.detach().double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    (wanted,) = torch.autograd.grad(expected, exact, arriving.double())
    assert out.dtype == grad.dtype == values
    half_a_step = torch.finfo(values).eps / 2
    for ours, theirs in ((out, expected), (grad, wanted)):
        assert ((ours - theirs).abs() <= half_a_step * theirs.abs() + 2e-6).all()
