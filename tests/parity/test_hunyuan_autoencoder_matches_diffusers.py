"""HunyuanImage-2.1's autoencoder gives what Diffusers' AutoencoderKLHunyuanImage gives, float32, within 1e-5."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLHunyuanImage

from library.models.autoencoder_hunyuan import (
    HunyuanAutoencoder,
    HunyuanAutoencoderConfig,
    open_hunyuan_autoencoder,
)
from library.models.loading import LoadSpec, on_meta
from library.safetensors_io import save_file
from tools.make_tiny_models import make_tiny_hunyuan_image
from tools.tiny_hunyuan_autoencoder import (
    HUNYUAN_AUTOENCODER,
    diffusers_hunyuan_autoencoder_config,
    diffusers_hunyuan_autoencoder_state,
    tiny_hunyuan_autoencoder,
    write_diffusers_hunyuan_autoencoder,
)
from tools.tiny_parts import fill_randomly


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return tiny_hunyuan_autoencoder(3)


def diffusers_autoencoder(
    state: dict[str, torch.Tensor], config: HunyuanAutoencoderConfig
) -> AutoencoderKLHunyuanImage:
    theirs = AutoencoderKLHunyuanImage.from_config(diffusers_hunyuan_autoencoder_config(config))
    theirs.load_state_dict(diffusers_hunyuan_autoencoder_state(state, config), strict=True)
    return theirs.eval()


@torch.no_grad()
def assert_alike(ours: HunyuanAutoencoder, theirs: AutoencoderKLHunyuanImage, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    mean, logvar = ours.encode_moments(images)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode(images), posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, atol=1e-5, rtol=1e-5)


def test_moments_and_images_are_the_same_at_the_real_stride(tiny):
    ours = HunyuanAutoencoder(HUNYUAN_AUTOENCODER)
    ours.load_state_dict(tiny)
    assert HUNYUAN_AUTOENCODER.stride == 32
    assert_alike(ours, diffusers_autoencoder(tiny, HUNYUAN_AUTOENCODER), 64, 96)


@pytest.mark.parametrize("widths", [(32, 64, 64, 128), (64, 32, 128), (128,)], ids=str)
def test_levels_of_any_widths_are_the_same(widths, tmp_path):
    config = HunyuanAutoencoderConfig(widths, res_blocks=2)
    made = HunyuanAutoencoder(config)
    fill_randomly(made, 1, "widths")
    theirs = diffusers_autoencoder(made.state_dict(), config)
    save_file(made.state_dict(), tmp_path / "vae.safetensors")
    opened = open_hunyuan_autoencoder(tmp_path / "vae.safetensors")
    assert opened.config == config
    assert_alike(opened.load(LoadSpec.of(torch.float32)), theirs, 16, 24)


def test_every_layout_loads_to_the_same_weights(tiny, tmp_path):
    save_file(tiny, tmp_path / "vae.safetensors")
    others = {f"model.diffusion_model.{key}": torch.zeros(4, 4) for key in ("img_in.proj.weight", "final_layer.x")}
    save_file({f"vae.{key}": value for key, value in tiny.items()} | others, tmp_path / "all_in_one.safetensors")
    kernels = {key: value[:, :, None] if value.dim() == 4 else value for key, value in tiny.items()}
    torch.save({"state_dict": {f"vae.{key}": value for key, value in kernels.items()}}, tmp_path / "pytorch_model.ckpt")
    torch.save(kernels, tmp_path / "plain.pt")
    write_diffusers_hunyuan_autoencoder(tmp_path / "model" / "vae", tiny)
    diffusers_autoencoder(tiny, HUNYUAN_AUTOENCODER).save_pretrained(tmp_path / "saved" / "vae")
    single = diffusers_hunyuan_autoencoder_state(tiny, HUNYUAN_AUTOENCODER)
    save_file(single, tmp_path / "single.safetensors")
    for path in (
        *("vae.safetensors", "all_in_one.safetensors", "pytorch_model.ckpt", "plain.pt"),
        *("model", "model/vae", "saved", "single.safetensors"),
    ):
        opened = open_hunyuan_autoencoder(tmp_path / path)
        assert opened.config == HUNYUAN_AUTOENCODER, path
        loaded = opened.load(LoadSpec.of(torch.float32))
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
        state = loaded.state_dict()
        assert state.keys() == tiny.keys()
        assert all(torch.equal(state[key], value) for key, value in tiny.items()), path


def test_the_tiny_models_autoencoder_is_the_same_in_each_layout(tiny_hunyuan_image, tmp_path):
    files = [tiny_hunyuan_image, make_tiny_hunyuan_image(tmp_path, "diffusers")]
    states = [open_hunyuan_autoencoder(each.autoencoder).load(LoadSpec()).state_dict() for each in files]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    theirs = AutoencoderKLHunyuanImage.from_pretrained(tmp_path, subfolder="vae")
    ours = open_hunyuan_autoencoder(tiny_hunyuan_image.autoencoder).load(LoadSpec())
    assert_alike(ours, theirs, 32, 64)


def test_other_numbers_of_norm_groups_are_read_from_the_configuration(tmp_path):
    config = HunyuanAutoencoderConfig((8, 32, 128), res_blocks=1, groups=8)
    state = HunyuanAutoencoder(config).state_dict()
    save_file(state, tmp_path / "vae.safetensors", {"config": json.dumps({"norm_num_groups": 8})})
    assert open_hunyuan_autoencoder(tmp_path / "vae.safetensors").config == config
    write_diffusers_hunyuan_autoencoder(tmp_path / "vae", state, config)
    written = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**written, "norm_num_groups": 8}))
    assert open_hunyuan_autoencoder(tmp_path / "vae").config == config


def test_the_full_size_model_has_the_known_keys():
    with on_meta():
        shapes = {
            key: tuple(value.shape)
            for key, value in HunyuanAutoencoder(HunyuanAutoencoderConfig()).state_dict().items()
        }
    assert len(shapes) == 324 and HunyuanAutoencoderConfig().stride == 32
    known = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (64, 128, 3, 3),
        "encoder.down.3.downsample.conv.weight": (256, 512, 3, 3),
        "encoder.down.5.block.1.conv2.weight": (1024, 1024, 3, 3),
        "encoder.mid.attn_1.q.weight": (1024, 1024, 1, 1),
        "encoder.conv_out.weight": (128, 1024, 3, 3),
        "decoder.conv_in.weight": (1024, 64, 3, 3),
        "decoder.up.0.block.2.norm1.weight": (1024,),
        "decoder.up.1.upsample.conv.weight": (2048, 1024, 3, 3),
        "decoder.up.4.upsample.conv.weight": (512, 256, 3, 3),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {key: shapes[key] for key in known} == known
    assert not any("nin_shortcut" in key or "5.downsample" in key or "5.upsample" in key for key in shapes)
