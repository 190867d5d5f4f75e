"""ControlNets of both kinds put out what Diffusers' put out, and reach the transformer as they do there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from library.models.flux.checkpoint import TransformerFile, open_transformer
from library.models.flux.controlnet import ControlNetFile, open_controlnet
from library.models.flux.transformer import FluxTransformer
from library.models.loading import LoadSpec
from library.safetensors_io import save_file
from tests.parity.flux_inputs import HEIGHT, WIDTH, assert_equal_to_scale, transformer_inputs
from tools.make_tiny_controlnet import HINT_CHANNELS
from tools.make_tiny_models import fill_randomly, transformer_config
from tools.other_layouts import diffusers_transformer_config, diffusers_transformer_state

TEXT = 7
KINDS = {
    "pixels": {"conditioning_embedding_channels": HINT_CHANNELS[-1], "patch_size": 2},
    "latents": {},
    "union": {"num_mode": 3},
}
MODE = 2


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> TransformerFile:
    """Three double and four single blocks, so that samples of two blocks must be spread."""
    ours = FluxTransformer(replace(transformer_config(), depth=3, depth_single=4))
    fill_randomly(ours, 1, "parity")
    path = tmp_path_factory.mktemp("transformer") / "flux.safetensors"
    save_file(ours.state_dict(), path)
    return open_transformer(path)


def make_controlnet(folder: Path, kind: str, guidance: bool = True) -> FluxControlNetModel:
    """Diffusers' model with random weights, saved in shards."""
    torch.manual_seed(0)
    shared = diffusers_transformer_config(
        replace(transformer_config(), depth=2, depth_single=3, guidance_embed=guidance)
    )
    model = FluxControlNetModel.from_config({**shared, **KINDS[kind], "_class_name": "FluxControlNetModel"})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, max_shard_size="300KB")
    return model


def open_ours(folder: Path, transformer: TransformerFile, kind: str) -> ControlNetFile:
    return open_controlnet(folder, transformer, mode=MODE if kind == "union" else None)


def control_image(kind: str, batch: int = 2) -> torch.Tensor:
    """Pixels or latents."""
    shape = (3, HEIGHT * 8, WIDTH * 8) if kind == "pixels" else (16, HEIGHT, WIDTH)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(4))


def arguments(given: dict[str, torch.Tensor], guidance: bool) -> dict[str, torch.Tensor | None]:
    """Our inputs under Diffusers' names."""
    return {
        "hidden_states": given["img"],
        "encoder_hidden_states": given["txt"],
        "pooled_projections": given["y"],
        "timestep": given["timesteps"],
        "img_ids": given["img_ids"],
        "txt_ids": given["txt_ids"],
        "guidance": given["guidance"] if guidance else None,
    }


def their_samples(model: FluxControlNetModel, given, control: torch.Tensor, kind: str, strength: float = 1.0):
    """Latents are packed by Diffusers' own pipeline."""
    from diffusers import FluxControlNetPipeline

    if kind != "pixels":
        control = FluxControlNetPipeline._pack_latents(control, *control.shape)
    mode = torch.full((len(control), 1), MODE) if kind == "union" else None
    with torch.no_grad():
        return model(
            **arguments(given, model.config.guidance_embeds),
            controlnet_cond=control,
            controlnet_mode=mode,
            conditioning_scale=strength,
            return_dict=False,
        )


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_controlnet_puts_out_is_that_of_diffusers(tmp_path, transformer, kind, guidance):
    theirs = make_controlnet(tmp_path, kind, guidance)
    opened = open_ours(tmp_path, transformer, kind)
    assert opened.config.takes_latents == (kind != "pixels")
    given, control = transformer_inputs(TEXT), control_image(kind)
    ours = opened.load(LoadSpec.of(torch.float32))(**given, control=control, mode=opened.mode)
    for mine, reference in zip(ours, their_samples(theirs, given, control, kind), strict=True):
        assert len(mine) == len(reference)
        for actual, expected in zip(mine, reference):
            assert_equal_to_scale(actual, expected)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_with_a_controlnet_is_that_of_diffusers(tmp_path, transformer, kind, strength):
    theirs = make_controlnet(tmp_path, kind)
    base = FluxTransformer2DModel.from_config(diffusers_transformer_config(transformer.config))
    ours = transformer.load(LoadSpec.of(torch.float32))
    base.load_state_dict(diffusers_transformer_state(ours.state_dict(), transformer.config), strict=True)
    given, control = transformer_inputs(TEXT), control_image(kind)
    double, single = their_samples(theirs, given, control, kind, strength)
    with torch.no_grad():
        expected = base(
            **arguments(given, True),
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
            controlnet_blocks_repeat=theirs.input_hint_block is not None,  # as their pipeline has it
        ).sample
    opened = open_ours(tmp_path, transformer, kind)
    controlnet = opened.load(LoadSpec.of(torch.float32))
    residuals = controlnet.residuals(transformer.config, strength, **given, control=control, mode=opened.mode)
    actual = ours(**given, **residuals)
    assert_equal_to_scale(actual, expected)
    assert (actual - ours(**given)).abs().max() > 0.05, "the ControlNet must matter"
