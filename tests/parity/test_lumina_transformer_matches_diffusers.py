"""The transformer gives what Diffusers' Lumina2Transformer2DModel gives for the same weights, float32, within 1e-5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import Lumina2Transformer2DModel

from library.models.loading import LoadSpec
from library.models.lumina.checkpoint import open_transformer
from library.models.lumina.transformer import LuminaConfig, LuminaTransformer
from tests.parity.flux_inputs import assert_equal_to_scale
from tools.make_tiny_models import LUMINA, fill_randomly
from tools.other_layouts import diffusers_lumina_config, diffusers_lumina_state

SIZES = {
    "tiny": LUMINA,
    "equal heads": replace(LUMINA, kv_heads=4, layers=1),
    "unequal axes": replace(LUMINA, dim=64, time_dim=64, head_dim=16, ffn_dim=256, axes_dims=(4, 8, 4), layers=1),
    "wide": LuminaConfig(
        dim=192, heads=6, kv_heads=2, head_dim=32, layers=2, refiner_layers=2, ffn_dim=768, text_dim=80, time_dim=192,
        axes_dims=(12, 12, 8), latent_channels=4,
    ),
}  # fmt: skip


def inputs(config: LuminaConfig, lengths: tuple[int, ...], height: int = 6, width: int = 10) -> dict[str, torch.Tensor]:
    """The arguments of ``LuminaTransformer.forward``."""
    random = torch.Generator().manual_seed(3)
    batch, longest = len(lengths), max(lengths)
    return {
        "latents": torch.randn(batch, config.latent_channels, height, width, generator=random),
        "timesteps": torch.linspace(0.03, 0.97, batch),
        "text": torch.randn(batch, longest, config.text_dim, generator=random),
        "text_mask": torch.arange(longest) < torch.tensor(lengths)[:, None],
    }


def run_diffusers(model: Lumina2Transformer2DModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(given["latents"], given["timesteps"], given["text"], given["text_mask"]).sample


@pytest.mark.parametrize("lengths", [(9, 9), (3, 20, 11), (300,)])
@pytest.mark.parametrize("size", SIZES)
def test_our_weights_in_diffusers_give_the_same_velocity(size, lengths):
    config = SIZES[size]
    ours = LuminaTransformer(config)
    fill_randomly(ours, 1, "parity")
    theirs = Lumina2Transformer2DModel.from_config({**diffusers_lumina_config(config), "axes_lens": (512, 512, 512)})
    theirs.load_state_dict(diffusers_lumina_state(ours.state_dict(), config), strict=True)
    given = inputs(config, lengths)
    assert_equal_to_scale(ours(**given), run_diffusers(theirs, given))


def test_diffusers_shards_in_our_loader_give_the_same_velocity(tmp_path):
    torch.manual_seed(0)
    theirs = Lumina2Transformer2DModel.from_config(diffusers_lumina_config(LUMINA))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    opened = open_transformer(tmp_path)
    assert opened.config == LUMINA
    given = inputs(LUMINA, (4, 7))
    assert_equal_to_scale(opened.load(LoadSpec.of(torch.float32))(**given), run_diffusers(theirs, given))
