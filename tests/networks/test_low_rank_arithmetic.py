"""The fused operation and its plain variant against the dense formula in float64, values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.memory.scaled import ScaledLinear, quantise
from library.memory.stored_linear import StoredLinear, store
from networks.adapters.low_rank import (
    add_low_rank,
    gradient_row_norms,
    linear_plus_low_rank,
    product_norm,
    product_row_norms,
)

IN, OUT, RANK, SCALE = 24, 40, 3, 0.37


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, bias: bool = True):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(*shape, IN, dtype=dtype, requires_grad=True)
    down = torch.randn(RANK, IN, dtype=dtype, requires_grad=True)
    up = torch.randn(OUT, RANK, dtype=dtype, requires_grad=True)
    return linear, x, down, up


def dense(linear: nn.Linear, x, down, up, mask=None):
    hidden = x @ down.t()
    if mask is not None:
        hidden = hidden * mask
    y = x @ linear.weight.t() + SCALE * hidden @ up.t()
    return y if linear.bias is None else y + linear.bias


def added(linear, x, down, up, scale, mask=None):
    return add_low_rank(linear(x), x, down, up, scale, mask)


BOTH = pytest.mark.parametrize("operation", [linear_plus_low_rank, added])


@BOTH
@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_value_and_gradients_are_those_of_the_dense_formula(operation, shape, bias, masked):
    linear, x, down, up = problem(shape, bias=bias)
    mask = torch.rand(*shape, RANK, dtype=torch.float64) if masked else None
    weights = torch.randn(*shape, OUT, dtype=torch.float64)
    y = operation(linear, x, down, up, SCALE, mask)
    reference = dense(linear, x, down, up, mask)
    torch.testing.assert_close(y, reference)
    mine = torch.autograd.grad((y * weights).sum(), (x, down, up))
    theirs = torch.autograd.grad((reference * weights).sum(), (x, down, up))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


@BOTH
def test_gradients_pass_the_numerical_check(operation):
    linear, x, down, up = problem((2, 3))
    mask = torch.rand(2, 3, RANK, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: operation(linear, *args, SCALE, mask), (x, down, up))


@BOTH
def test_inputs_and_gradients_may_lie_in_memory_in_any_order(operation):
    linear, _, down, up = problem((1,))
    base = torch.randn(IN, 6, 4, dtype=torch.float64, requires_grad=True)
    x = base.permute(2, 1, 0)[:, ::2]
    assert not x.is_contiguous()
    y = operation(linear, x, down, up, SCALE)
    reference = dense(linear, x, down, up)
    torch.testing.assert_close(y, reference)
    # a transposed and an expanded gradient
    for weights in (torch.randn(OUT, 3, 4, dtype=torch.float64).permute(2, 1, 0), torch.ones(()).double()):
        mine = torch.autograd.grad((y * weights).sum(), (base, down, up), retain_graph=True)
        theirs = torch.autograd.grad((reference * weights).sum(), (base, down, up), retain_graph=True)
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b)


@BOTH
@pytest.mark.parametrize("shape", [(5,), (2, 7)])
def test_the_output_may_be_changed_in_place(operation, shape):
    linear, x, down, up = problem(shape)
    y = operation(linear, x, down, up, SCALE)
    y[..., : OUT // 2].mul_(3)
    y.add_(1)
    reference = dense(linear, x, down, up)
    expected = torch.cat([3 * reference[..., : OUT // 2], reference[..., OUT // 2 :]], dim=-1) + 1
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y.square().sum(), (x, down, up))
    for a, b in zip(mine, torch.autograd.grad(expected.square().sum(), (x, down, up))):
        torch.testing.assert_close(a, b)


@BOTH
def test_only_wanted_gradients_are_made(operation):
    linear, x, down, up = problem((4,))
    x.requires_grad_(False)
    down.requires_grad_(False)
    operation(linear, x, down, up, SCALE).sum().backward()
    assert x.grad is None and down.grad is None and up.grad is not None


def test_a_second_derivative_is_refused():
    """The product of both matrices that the first one keeps would be taken for a constant."""
    linear, x, down, up = problem((2, 7))
    y = linear_plus_low_rank(linear, x, down, up, SCALE).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, up, create_graph=True)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_under_autocast_float32_matrices_train_with_a_base_in_any_storage(operation, dtype, storage):
    linear, x, down, up = problem((2, 9), torch.float32)
    linear.to(storage)
    weights = torch.randn(2, 9, OUT)
    with torch.autocast("cpu", dtype):
        y = operation(linear, x, down, up, SCALE)
    assert y.dtype == dtype
    (y.float() * weights).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, down, up)]
    reference = dense(linear.double(), *exact)
    (reference * weights.double()).sum().backward()
    tolerance = 2**-6 if dtype == torch.bfloat16 else 2**-9
    assert (y.double() - reference).abs().max() < tolerance * reference.abs().max()
    for mine, theirs in zip((x, down, up), exact):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad.double() - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()


@BOTH
def test_checkpointing_under_autocast_gives_the_very_same_gradients(operation):
    def run(recompute: bool):
        linear, x, down, up = problem((2, 9), torch.float32)
        linear.bfloat16()

        def block(x):
            return torch.nn.functional.gelu(operation(linear, x, down, up, SCALE))

        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        y.square().sum().backward()
        return [y, x.grad, down.grad, up.grad]

    for a, b in zip(run(True), run(False)):
        assert torch.equal(a, b)


def test_without_autocast_the_matrices_follow_the_activations_dtype():
    linear, x, down, up = problem((2, 9), torch.float32)
    y = linear_plus_low_rank(linear.bfloat16(), x.bfloat16(), down, up, SCALE)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert down.grad.dtype == up.grad.dtype == x.grad.dtype == torch.float32


def test_small_scales_do_not_overflow_float16_gradients():
    linear, x, down, up = problem((4,), torch.float16)
    with torch.no_grad():
        up.fill_(1000.0)
    y = linear_plus_low_rank(linear, x, down, up, 1e-3)
    y.backward(torch.full_like(y, 10.0))
    assert torch.isfinite(x.grad).all() and torch.isfinite(down.grad).all()


def test_moving_the_frozen_weight_between_forward_and_backward_is_allowed():
    """Block swapping points a parameter to other memory while its block is not running."""
    linear, x, down, up = problem((4,))
    linear_plus_low_rank(linear, x, down, up, SCALE).sum().backward()
    expected, x.grad = x.grad, None
    values = linear.weight.detach().clone()
    y = linear_plus_low_rank(linear, x, down, up, SCALE).sum()
    linear.weight.data = torch.empty(0, dtype=torch.float64)
    linear.weight.data = values
    y.backward()
    assert torch.equal(x.grad, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_norms_from_gram_matrices_are_those_of_the_full_product(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, columns, generator=generator)
    up = torch.randn(rows, rank, generator=generator)
    grad_down = torch.randn(rank, columns, generator=generator)
    grad_up = torch.randn(rows, rank, generator=generator)
    product = up.double() @ down.double()
    change = up.double() @ grad_down.double() + grad_up.double() @ down.double()
    size = up.norm() ** 2 * down.norm() ** 2
    grad_size = (up.norm() ** 2 + grad_up.norm() ** 2) * (down.norm() ** 2 + grad_down.norm() ** 2)
    for norms, reference, scale in (
        (product_norm(down, up), product.norm(), size),
        (product_row_norms(down, up), product.norm(dim=1), size),
        (gradient_row_norms(down, up, grad_down, grad_up), change.norm(dim=1), grad_size),
    ):
        assert (norms.double().square() - reference.square()).abs().max() < 1e-6 * scale


class SumOfTwo(StoredLinear):
    """A storage format with products of its own, which never makes its weight: it is the sum of two matrices."""

    first: Tensor
    second: Tensor

    @property
    def stored_weight(self) -> Any:
        raise AssertionError("the weight was made")

    def quantise(self, weight: Tensor) -> Any:
        raise AssertionError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, self.first, bias) + x @ self.second.t()

    def matmul_t(self, grad: Tensor) -> Tensor:
        return grad @ self.first + grad @ self.second


@pytest.mark.parametrize("bias", [True, False])
def test_a_storage_format_computes_with_its_own_products(bias):
    linear, x, down, up = problem((2, 7), bias=bias)
    stored: Any = nn.Linear(IN, OUT, bias=bias).requires_grad_(False).double()
    del stored.weight
    stored.__class__ = SumOfTwo
    stored.first = torch.rand(OUT, IN, dtype=torch.float64)
    stored.second = linear.weight.detach() - stored.first
    stored.bias = linear.bias
    weights = torch.randn(2, 7, OUT, dtype=torch.float64)
    y, reference = linear_plus_low_rank(stored, x, down, up, SCALE), dense(linear, x, down, up)
    torch.testing.assert_close(y, reference)
    mine = torch.autograd.grad((y * weights).sum(), (x, down, up))
    for one, other in zip(mine, torch.autograd.grad((reference * weights).sum(), (x, down, up))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_an_8_bit_layer_gives_the_very_bits_of_its_dense_weight(autocast):
    linear, x, down, up = problem((2, 7), torch.float32)
    eight_bit = copy.deepcopy(linear)
    store(eight_bit, quantise(linear.weight), ScaledLinear, torch.float32)
    linear.weight.copy_(eight_bit.dense(torch.float32))
    if autocast is not None:  # the codes times the scale are rounded once, to the dtype of the product
        linear.weight.copy_(eight_bit.dense(autocast))
    results = []
    for layer in (eight_bit, linear):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = linear_plus_low_rank(layer, x, down, up, SCALE)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, down, up))])
    for one, other in zip(*results):
        assert torch.equal(one, other)
