"""Products in fp8: how far they are from the product with the same weights, and where they are not made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.memory import formats
from library.memory.fp8_compute import FastScaledLinear, in_fp8
from library.memory.storage import Storage
from library.randomness import generator
from networks.adapters.low_rank import linear_plus_low_rank

IN, OUT = 256, 96


def normal(*shape: int, purpose: str = "values") -> Tensor:
    return torch.randn(*shape, generator=generator(0, purpose))


def layer_of(granularity: str, dtype: torch.dtype, inputs: int = IN, outputs: int = OUT, fast: bool = True):
    layer = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    layer.bias.copy_(normal(outputs, purpose="bias"))
    rows = 2.0 ** torch.linspace(-3, 3, outputs)[:, None]  # so that scales of channels differ
    storage = Storage("fp8", granularity, fast)  # type: ignore[arg-type]
    formats.store_as(layer, formats.quantise(0.02 * rows * normal(outputs, inputs), storage), storage, dtype)
    return layer


def bound(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    """The largest possible error of ``a @ b`` (float64) where ``a`` is rounded to fp8.

    Half a unit of four significant bits (2^-4), and below the smallest normal code half a step (2^-10) of the scale;
    as much as bfloat16 can lose before that rounding and, three times, after the product.
    """
    rounding = (2.0**-4 + 2.0**-8) * a.abs() + 2.0**-10 * a.abs().max() / 448
    return 1.01 * (rounding @ b.abs()) + 3 * 2.0**-8 * exact.abs() + 1e-6


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)]
)
def test_outputs_and_input_gradients_differ_by_the_rounding_of_activations_alone(granularity, dtype):
    layer = layer_of(granularity, dtype)
    assert isinstance(layer, FastScaledLinear)
    x = normal(3, 20, IN, purpose="x").to(dtype).requires_grad_()
    grad = normal(3, 20, OUT, purpose="grad").to(dtype)
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None and y.dtype == x.grad.dtype == dtype
    weight = layer.dense(torch.float64)
    rows, grads, bias = x.detach().double().view(-1, IN), grad.double().view(-1, OUT), layer.bias.double()
    folded = grads * (layer.scale.double() / layer.scale.double().max()).reshape(1, -1)  # scales of channels come first
    back = weight if granularity == "tensor" else weight / (layer.scale.double() / layer.scale.double().max())
    for ours, product, extra, limit in (
        (y, rows @ weight.t(), bias, bound(rows, weight.t(), rows @ weight.t() + bias)),
        (x.grad, grads @ weight, 0.0, bound(folded if granularity == "channel" else grads, back, grads @ weight)),
    ):
        error = ours.detach().double().view(product.shape) - product - extra
        assert (error.abs() <= limit).all()
        assert 0.01 < error.norm() / product.norm() < 0.03  # 2.6 % where the activations are normal


def test_a_lora_over_it_takes_its_products():
    """The output is the layer's plus the addition's, and so are the gradients."""
    layer = layer_of("tensor", torch.float32)
    down, up = (normal(*shape, purpose="lora").requires_grad_() for shape in ((4, IN), (OUT, 4)))
    x = normal(2, 5, IN, purpose="x").requires_grad_()
    y = linear_plus_low_rank(layer, x, down, up, 0.5)
    reference = layer(x) + 0.5 * x @ down.t() @ up.t()
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-4)
    weights = normal(2, 5, OUT, purpose="weights")
    ours = torch.autograd.grad((y * weights).sum(), (x, down, up))
    theirs = torch.autograd.grad((reference * weights).sum(), (x, down, up))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e30])
def test_the_error_does_not_depend_on_the_size_of_the_activations(size):
    x = size * normal(20, IN)
    codes, scale = in_fp8(x)
    error = (codes.double() * scale.double() - x.double()).norm() / x.double().norm()
    assert error == pytest.approx(0.026, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_numbers_of_16_bits_are_divided_exactly(dtype):
    """Gradients without loss scaling: their scale is below what float16 holds."""
    x = (3e-7 * normal(20, IN)).to(dtype)
    codes, scale = in_fp8(x)
    assert codes.float().abs().max() == 448
    torch.testing.assert_close(scale.double() * 448, x.double().abs().max(), rtol=1e-6, atol=0)


def test_zeros_give_the_bias_and_what_is_not_finite_stays_so():
    layer = layer_of("tensor", torch.float32)
    assert torch.equal(layer(torch.zeros(2, IN)), layer.bias.expand(2, OUT))
    for value in (float("nan"), float("inf")):
        x = normal(3, IN)
        x[1, 2] = value
        assert not layer(x).isfinite().any()  # an optimizer's check of gradients sees it


@pytest.mark.parametrize(
    ("granularity", "dtype", "inputs", "outputs"),
    [
        ("block", torch.bfloat16, IN, OUT),
        ("tensor", torch.float64, IN, OUT),
        ("tensor", torch.bfloat16, IN + 8, OUT),
        ("channel", torch.bfloat16, IN, OUT + 8),
    ],
    ids=["scales by block", "float64", "inputs", "outputs"],
)
def test_elsewhere_the_product_is_that_of_the_format(granularity, dtype, inputs, outputs):
    results = []
    for fast in (True, False):
        layer = layer_of(granularity, dtype, inputs, outputs, fast)
        x = normal(3, inputs, purpose="x").to(dtype).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_a_batch_without_rows_gives_none():
    assert layer_of("tensor", torch.bfloat16)(torch.empty(0, 5, IN, dtype=torch.bfloat16)).shape == (0, 5, OUT)


def test_nothing_of_the_weight_is_kept_for_the_backward_pass_and_the_codes_may_move():
    layer, kept = layer_of("channel", torch.float32), []
    x = normal(2, IN, purpose="x").requires_grad_()
    (reference,) = torch.autograd.grad(layer(x).sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y = layer(x)
    assert kept == []
    before, layer.codes = layer.codes, layer.codes.clone()
    before.view(torch.uint8).fill_(255)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], reference)
