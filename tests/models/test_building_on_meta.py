"""Layers built on torch's meta device draw no initial values; everywhere else they draw torch's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from library.models.loading import on_meta

LAYERS = {
    "linear": lambda: nn.Linear(3, 4),
    "convolution": lambda: nn.Conv2d(2, 3, 3),
    "transposed convolution": lambda: nn.ConvTranspose1d(2, 3, 3),
    "embedding": lambda: nn.Embedding(5, 3, padding_idx=0),
    "layer norm": lambda: nn.LayerNorm(4),
    "layer norm without weights": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "group norm without weights": lambda: nn.GroupNorm(2, 4, affine=False),
}


def initial(make) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return make().state_dict()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_only_layers_on_meta_are_left_without_values(make):
    expected = initial(make)
    with on_meta():
        built = make().state_dict()
        with ThreadPoolExecutor(1) as pool:  # torch's device is one of the thread's
            elsewhere = pool.submit(initial, make).result()
        here = initial(lambda: with_values(make))
    assert all(tensor.is_meta for tensor in built.values())
    assert {name: tensor.shape for name, tensor in built.items()} == {n: t.shape for n, t in expected.items()}
    for drawn in (elsewhere, here, initial(make)):
        assert drawn.keys() == expected.keys()
        assert all(torch.equal(drawn[name], expected[name]) for name in expected)


def with_values(make) -> nn.Module:
    with torch.device("cpu"):
        return make()


def test_an_error_while_building_leaves_torch_as_it_was():
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    before = [kind.reset_parameters for kind in kinds]
    with pytest.raises(ZeroDivisionError), on_meta(), on_meta():
        raise ZeroDivisionError
    assert [kind.reset_parameters for kind in kinds] == before
    assert not nn.Linear(2, 2).weight.is_meta
