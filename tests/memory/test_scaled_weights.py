"""Frozen weights in 8 bits: what is stored, what is computed, which gradients come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.memory.scaled import FP8, LARGEST, ScaledLinear, ScaledWeight, quantise
from library.memory.storage import block_linears
from library.memory.stored_linear import store
from library.randomness import generator


def normal(*shape: int, purpose: str = "values", deviation: float = 1.0) -> torch.Tensor:
    return deviation * torch.randn(*shape, generator=generator(0, purpose))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8, bias=False), nn.SiLU())])
        self.approximator = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})


@pytest.mark.parametrize("deviation", [1.0, 0.02, 0.002, 1e-6])
def test_error_relative_to_the_weights_does_not_depend_on_their_size(deviation):
    weight = normal(512, 512, deviation=deviation)
    restored = quantise(weight).to(torch.float32)
    error = ((restored - weight).double().square().mean() / weight.double().square().mean()).sqrt().item()
    assert error == pytest.approx(0.026, abs=0.002)  # 3 stored bits after the leading one, over normal weights


def test_a_plain_cast_of_small_weights_loses_what_the_scale_keeps():
    weight = normal(256, 256, deviation=0.002)
    plain, scaled = weight.to(FP8).float(), quantise(weight).to(torch.float32)
    assert (plain == 0).float().mean() > 0.3
    assert (scaled == 0).float().mean() < 0.01


def test_the_largest_weight_becomes_the_largest_code_and_zeros_stay_zeros():
    weight = torch.tensor([[0.5, -2.0], [0.0, 1.0]])
    stored = quantise(weight)
    assert stored.codes.dtype == FP8
    assert stored.codes.float().abs().max() == LARGEST[FP8]
    assert torch.equal(stored.to(torch.float32), weight)  # powers of two are exact
    assert torch.equal(quantise(torch.zeros(3, 3)).to(torch.float32), torch.zeros(3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_dequantised_layer(bias, dtype):
    layer = nn.Linear(16, 12, bias=bias).to(dtype)
    stored = quantise(normal(12, 16))
    reference = nn.Linear(16, 12, bias=bias).to(dtype)
    reference.load_state_dict(layer.state_dict())
    reference.weight.data = stored.to(dtype)
    store(layer, stored, ScaledLinear, dtype)
    x = normal(5, 3, 16, purpose="x").to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = layer(x), reference(y)
    assert torch.equal(ours, theirs)
    grad = normal(5, 3, 12, purpose="grad").to(dtype)
    ours.backward(grad)
    theirs.backward(grad)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_autocast_decides_in_which_format_the_layer_computes():
    layer = nn.Linear(16, 12)
    store(layer, quantise(normal(12, 16)), ScaledLinear, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(normal(4, 16)).dtype == torch.bfloat16


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass():
    layer = nn.Linear(64, 64, bias=False)
    store(layer, quantise(normal(64, 64)), ScaledLinear, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        layer(normal(2, 64).requires_grad_())
    assert kept == []


def test_the_weight_is_shown_dequantised_and_can_be_replaced():
    layer = nn.Linear(4, 4)
    store(layer, quantise(torch.eye(4)), ScaledLinear, torch.bfloat16)
    assert isinstance(layer, ScaledLinear)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.float(), torch.eye(4))
    layer.set_weight(2 * torch.eye(4))
    assert torch.equal(layer.weight.float(), 2 * torch.eye(4))
    assert set(dict(layer.named_parameters())) == {"bias"}


def test_a_cast_of_the_model_leaves_the_codes_and_a_move_takes_them_along():
    layer = nn.Linear(4, 4)
    store(layer, quantise(torch.eye(4)), ScaledLinear, torch.float32)
    layer.to(torch.bfloat16)
    assert layer.codes.dtype == FP8
    assert layer.scale.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    layer.to("meta")
    assert layer.codes.device.type == "meta"


def test_layers_of_blocks_are_chosen_and_what_surrounds_them_is_not():
    names = set(block_linears(Model(), keep=("approximator",)))
    assert names == {"blocks.0", "blocks.1.0"}


def test_other_layers_and_other_shapes_are_refused():
    class Special(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Special"):
        store(Special(4, 4), quantise(torch.eye(4)), ScaledLinear, torch.float32)
    with pytest.raises(ValueError, match="shape"):
        store(nn.Linear(4, 4), ScaledWeight(torch.zeros(2, 4, dtype=FP8), torch.ones(())), ScaledLinear, torch.float32)
