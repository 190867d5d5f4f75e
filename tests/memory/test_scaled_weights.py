"""Frozen weights in 8 bits: what is stored, what is computed, which gradients come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.memory.scaled import FP8, LARGEST, ScaledLinear, quantise
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


def test_autocast_decides_in_which_format_the_layer_computes():
    layer = nn.Linear(16, 12)
    store(layer, quantise(normal(12, 16)), ScaledLinear, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(normal(4, 16)).dtype == torch.bfloat16


def test_layers_of_blocks_are_chosen_and_what_surrounds_them_is_not():
    names = set(block_linears(Model(), keep=("approximator",)))
    assert names == {"blocks.0", "blocks.1.0"}
