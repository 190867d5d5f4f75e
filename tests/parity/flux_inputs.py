"""What the FLUX.1 family's transformers are given in comparisons with diffusers, and how results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from library.models.flux.transformer import image_ids

HEIGHT, WIDTH = 6, 10  # in latent positions
TIMESTEPS = (0.03, 0.9)
GUIDANCE = (3.5, 1.0)


def transformer_inputs(text_tokens: int, batch: int = 2) -> dict[str, Tensor]:
    """The arguments of ``FluxTransformer.forward``, but for a mask."""
    random = torch.Generator().manual_seed(3)
    return {
        "img": torch.randn(batch, HEIGHT * WIDTH // 4, 64, generator=random),
        "img_ids": image_ids(HEIGHT, WIDTH),
        "txt": torch.randn(batch, text_tokens, 64, generator=random),
        "txt_ids": torch.zeros(text_tokens, 3),
        "timesteps": torch.tensor(TIMESTEPS)[:batch],
        "y": torch.randn(batch, 64, generator=random),
        "guidance": torch.tensor(GUIDANCE)[:batch],
    }


def assert_equal_to_scale(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert expected.abs().max() > 0.1, "the reference must not be trivially small"
    assert (actual - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
