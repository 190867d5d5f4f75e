"""Tiny models with the class names and module paths of the real ones."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from library.models.flux.transformer import FluxConfig, FluxTransformer

TINY_FLUX = FluxConfig(
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single=2,
    in_channels=64,
    context_dim=48,
    vector_dim=32,
    time_dim=32,
    mlp_hidden=256,
    axes_dims=(4, 14, 14),
)


@pytest.fixture
def transformer() -> FluxTransformer:
    """A frozen FLUX transformer of hidden size 64 with 2 double and 2 single blocks."""
    torch.manual_seed(0)
    model = FluxTransformer(TINY_FLUX).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """A batch of two for ``transformer``: 4 x 4 image tokens, 5 text tokens."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "img": normal(2, 16, 64),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt": normal(2, 5, 48),
        "txt_ids": torch.zeros(5, 3),
        "timesteps": torch.tensor([0.3, 0.8]),
        "y": normal(2, 32),
        "guidance": torch.tensor([1.0, 3.5]),
    }


@pytest.fixture
def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
        bos_token_id=97, eos_token_id=98,
    )  # fmt: skip
    return CLIPTextModel(config).requires_grad_(False).eval()


@pytest.fixture
def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).requires_grad_(False).eval()


def randomise(network: nn.Module, size: float = 0.1) -> None:
    """Give every LoRA matrix values, so that the network has an effect."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.fixture(name="randomise")
def randomise_fixture():
    return randomise


@pytest.fixture
def messages():
    """What the suite says and warns of, in order."""
    from library.console import LOGGER

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield heard
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)
