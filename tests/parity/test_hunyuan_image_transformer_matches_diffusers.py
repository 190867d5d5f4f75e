"""The transformer gives what Diffusers' gives for the same weights, float32, within 1e-5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.lean_imports import diffusers_class
from library.models.hunyuan_image.checkpoint import open_transformer
from library.models.hunyuan_image.transformer import HunyuanImageConfig, HunyuanImageTransformer
from library.models.loading import LoadSpec
from library.models.transformer_parts import GridRotations, sinusoid
from tests.parity.flux_inputs import assert_equal_to_scale
from tools.make_tiny_models import HUNYUAN_IMAGE, fill_randomly
from tools.other_layouts import diffusers_hunyuan_image_config, diffusers_hunyuan_image_state

SIZES = {
    "tiny": HUNYUAN_IMAGE,
    "real heads": HunyuanImageConfig(
        hidden_size=256, num_heads=2, depth=2, depth_single=3, refiner_depth=2, mlp_hidden=1024, text_dim=80,
        single_mlp_hidden=1024, refiner_mlp_hidden=1024, in_channels=8, out_channels=8, glyph_dim=40, glyph_hidden=72,
    ),
    "patches, unequal axes": replace(
        HUNYUAN_IMAGE, num_heads=4, axes_dims=(10, 6), theta=100.0, patch_size=2, out_channels=5, mlp_hidden=128,
        single_mlp_hidden=128, depth=1, depth_single=1,
    ),
}  # fmt: skip
TEXTS = {
    "glyphs in one": ((5, 20, 9), (0, 12, 0)),
    "no glyphs": ((7, 7), (0, 0)),
    "equal": ((300,), (30,)),
    "equal sums": ((4, 8), (6, 2)),
}


def their_model(config: HunyuanImageConfig) -> torch.nn.Module:
    """Their glyphs are always 2048 wide inside."""
    model = diffusers_class("HunyuanImageTransformer2DModel").from_config(diffusers_hunyuan_image_config(config))
    from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection

    mapper = HunyuanImageByT5TextProjection(config.glyph_dim, config.glyph_hidden, config.hidden_size)
    model.context_embedder_2 = mapper
    return model


def inputs(
    config: HunyuanImageConfig, lengths: tuple[int, ...], glyphs: tuple[int, ...], height: int = 4, width: int = 6
) -> dict[str, torch.Tensor]:
    """The arguments of ``HunyuanImageTransformer.forward``; glyphs are padded as the encoder gives them."""
    random = torch.Generator().manual_seed(3)
    batch, longest, room = len(lengths), max(lengths), 40
    return {
        "latents": torch.randn(batch, config.in_channels, height, width, generator=random),
        "timesteps": torch.linspace(33.3, 970.7, batch),
        "text": torch.randn(batch, longest, config.text_dim, generator=random),
        "text_mask": torch.arange(longest) < torch.tensor(lengths)[:, None],
        "glyphs": torch.randn(batch, room, config.glyph_dim, generator=random),
        "glyph_mask": torch.arange(room) < torch.tensor(glyphs)[:, None],
    }


def run_diffusers(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(
            given["latents"], given["timesteps"], given["text"], given["text_mask"],
            encoder_hidden_states_2=given["glyphs"], encoder_attention_mask_2=given["glyph_mask"],
        ).sample  # fmt: skip


@pytest.mark.parametrize(
    ("size", "texts"),
    [
        *(("tiny", texts) for texts in TEXTS),
        *((size, "glyphs in one") for size in SIZES if size != "tiny"),
        *(
            pytest.param(size, texts, marks=pytest.mark.thorough)
            for size in SIZES
            for texts in TEXTS
            if size != "tiny" and texts != "glyphs in one"
        ),
    ],
)
def test_our_weights_in_diffusers_give_the_same_velocity(size, texts):
    config = SIZES[size]
    ours = HunyuanImageTransformer(config)
    fill_randomly(ours, 1, "parity")
    theirs = their_model(config)
    theirs.load_state_dict(diffusers_hunyuan_image_state(ours.state_dict(), config), strict=True)
    given = inputs(config, *TEXTS[texts])
    assert_equal_to_scale(ours(**given), run_diffusers(theirs, given))


def test_diffusers_shards_in_our_loader_give_the_same_velocity(tmp_path):
    torch.manual_seed(0)
    theirs = their_model(HUNYUAN_IMAGE)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="1MB")
    opened = open_transformer(tmp_path)
    assert opened.config == HUNYUAN_IMAGE and len(opened.source.checkpoint.files) > 1
    given = inputs(HUNYUAN_IMAGE, (4, 7), (0, 3))
    assert_equal_to_scale(opened.load(LoadSpec.of(torch.float32))(**given), run_diffusers(theirs, given))


def test_times_and_positions_are_those_of_the_official_code():
    """Values that its functions gave."""
    embedded = sinusoid(torch.tensor([832.0]), 256)[0, [0, 1, 127, 128, 255]]
    expected = torch.tensor([-0.866797, 0.165857, 0.996006, 0.498661, 0.089288])
    torch.testing.assert_close(embedded, expected, atol=1e-6, rtol=0)
    rotations = GridRotations(HunyuanImageConfig().axes_dims, HunyuanImageConfig().theta).of(2, 3, torch.device("cpu"))
    cosines = rotations[5].real.repeat_interleave(2)[[0, 1, 2, 63, 64, 65, 127]]
    expected = torch.tensor([0.540302, 0.540302, 0.666795, 0.999989, -0.416147, -0.416147, 0.999957])
    torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)
