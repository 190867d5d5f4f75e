"""The transformer gives what Diffusers' FluxTransformer2DModel gives for the same weights, float32, within 1e-5."""

from __future__ import annotations

import diffusers
import pytest
import torch

from library.models.flux.checkpoint import open_transformer
from library.models.flux.transformer import (
    FluxTransformer,
    image_ids,
    pack_latents,
    sinusoid,
    unpack_latents,
)
from library.models.loading import LoadSpec
from library.models.transformer_parts import apply_rope, rope_rotations
from tests.parity.flux_inputs import HEIGHT, WIDTH, assert_equal_to_scale, transformer_inputs
from tools.make_tiny_models import fill_randomly, transformer_config
from tools.other_layouts import diffusers_transformer_config, diffusers_transformer_state

TEXT = 7


def run_diffusers(model: diffusers.FluxTransformer2DModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(
            hidden_states=given["img"],
            encoder_hidden_states=given["txt"],
            pooled_projections=given["y"],
            timestep=given["timesteps"],
            img_ids=given["img_ids"],
            txt_ids=given["txt_ids"],
            guidance=given["guidance"] if model.config.guidance_embeds else None,
        ).sample


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_our_weights_in_diffusers_give_the_same_velocity(variant):
    config = transformer_config(variant)
    ours = FluxTransformer(config)
    fill_randomly(ours, 1, "parity")
    theirs = diffusers.FluxTransformer2DModel.from_config(diffusers_transformer_config(config))
    theirs.load_state_dict(diffusers_transformer_state(ours.state_dict(), config), strict=True)
    given = transformer_inputs(TEXT)
    assert_equal_to_scale(ours(**given), run_diffusers(theirs, given))


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_diffusers_shards_in_our_loader_give_the_same_velocity(variant, tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.FluxTransformer2DModel.from_config(diffusers_transformer_config(transformer_config(variant)))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    opened = open_transformer(tmp_path)
    assert opened.variant == variant
    given = transformer_inputs(TEXT)
    assert_equal_to_scale(opened.load(LoadSpec.of(torch.float32))(**given), run_diffusers(theirs, given))


def test_packing_and_positions_are_those_of_diffusers():
    latents = torch.randn(2, 16, HEIGHT, WIDTH)
    assert torch.equal(pack_latents(latents), diffusers.FluxPipeline._pack_latents(latents, 2, 16, HEIGHT, WIDTH))
    assert torch.equal(unpack_latents(pack_latents(latents), HEIGHT, WIDTH), latents)
    theirs = diffusers.FluxPipeline._prepare_latent_image_ids(1, HEIGHT // 2, WIDTH // 2, "cpu", torch.float32)
    assert torch.equal(image_ids(HEIGHT, WIDTH), theirs)


def test_embeddings_have_the_known_values():
    """Numbers observed in the original implementation."""
    embedding = sinusoid(torch.tensor([0.5]), 256)[0]
    torch.testing.assert_close(embedding[:3], torch.tensor([-0.8838493, 0.9459457, 0.8485069]), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding[128:131], torch.tensor([-0.4677718, 0.3243249, -0.5291843]), atol=1e-5, rtol=0)
    rope = rope_rotations(torch.tensor([[[3.0]]]), (4,), 10000.0)
    rotated = apply_rope(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), rope).flatten()
    torch.testing.assert_close(rotated, torch.tensor([-1.2722325, -1.8388650, 2.8786681, 4.0881867]))


def test_bfloat16_weights_stay_close_to_float32():
    ours = FluxTransformer(transformer_config())
    fill_randomly(ours, 1, "parity")
    given = transformer_inputs(TEXT)
    expected = ours(**given)
    actual = ours.to(torch.bfloat16)(**given)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()
