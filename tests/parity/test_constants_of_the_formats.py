"""What shapes cannot give is the constant of the published format, whatever the width, unless a file says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.autoencoder_kl import AutoencoderConfig, open_autoencoder
from library.models.autoencoder_kl import AutoencoderKL as FluxAutoencoder
from library.models.loading import LoadSpec, TensorSource, load_module
from library.models.stable_diffusion.checkpoint import UnetFile, infer_unet_config, open_vae
from library.safetensors_io import save_file
from tools.make_tiny_models import fill_randomly
from tools.other_layouts import diffusers_autoencoder_config, diffusers_autoencoder_state

WIDTHS = (32, 64)
GROUPS = pytest.mark.parametrize("groups", [32, 8])


def write(module: torch.nn.Module, path: Path, **config: int) -> Path:
    save_file(module.state_dict(), path, {"config": json.dumps(config)} if config else None)
    return path


def config_of(groups: int) -> dict[str, int]:
    """What a file says of itself: nothing where it is as the published ones."""
    return {} if groups == 32 else {"norm_num_groups": groups}


def image() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@GROUPS
def test_a_narrow_flux_autoencoder_gives_what_diffusers_gives(groups, tmp_path):
    config = AutoencoderConfig(channels=32, multipliers=(1, 2), res_blocks=1, groups=groups)
    ours = FluxAutoencoder(config)
    fill_randomly(ours, 0, "narrow")
    opened = open_autoencoder(write(ours, tmp_path / "ae.safetensors", **config_of(groups)))
    theirs = AutoencoderKL.from_config(diffusers_autoencoder_config(config)).eval()
    theirs.load_state_dict(diffusers_autoencoder_state(ours.state_dict(), config))
    with torch.no_grad():
        mean, _ = opened.load(LoadSpec.of(torch.float32)).encode_moments(image())
        torch.testing.assert_close(mean, theirs.encode(image()).latent_dist.mean, atol=1e-5, rtol=1e-5)


@GROUPS
def test_a_narrow_vae_gives_what_diffusers_gives(groups, tmp_path):
    theirs = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=groups,
    ).eval()
    fill_randomly(theirs, 0, "narrow")
    ours = open_vae(write(theirs, tmp_path / "vae.safetensors", **config_of(groups)), "sd1").load(
        LoadSpec.of(torch.float32)
    )
    with torch.no_grad():
        assert torch.equal(ours.encode(image()).latent_dist.mean, theirs.encode(image()).latent_dist.mean)


@GROUPS
def test_a_narrow_unet_gives_what_diffusers_gives(groups, tmp_path):
    theirs = UNet2DConditionModel(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=groups,
    ).eval()
    fill_randomly(theirs, 0, "narrow")
    path = write(theirs, tmp_path / "unet.safetensors", **config_of(groups))
    source = TensorSource(open_checkpoint(path, None), part="unet")
    ours = UnetFile(source, infer_unet_config(source, "sd1")).meta_module()
    load_module(ours, source, LoadSpec(torch.float32))
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 4, 8, 8, generator=draw), 500, torch.randn(1, 3, 16, generator=draw)
    with torch.no_grad():
        assert torch.equal(ours(*inputs).sample, theirs(*inputs).sample)


def test_a_width_that_the_constant_does_not_divide_is_named_with_the_entry_that_would_say_more(tmp_path):
    model = FluxAutoencoder(AutoencoderConfig(channels=8, multipliers=(1, 2), res_blocks=1, groups=8))
    with pytest.raises(UserError, match='8 channels cannot be split into 32 norm groups.*"norm_num_groups"'):
        open_autoencoder(write(model, tmp_path / "ae.safetensors"))
    with pytest.raises(UserError, match="must be a positive integer"):
        open_autoencoder(write(model, tmp_path / "ae.safetensors", norm_num_groups=0))
