"""The autoencoder gives what Diffusers' AutoencoderKL gives for the same weights, float32, within 1e-5."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder

from library.models.autoencoder_kl import (
    LATENT_SCALE,
    LATENT_SHIFT,
    AutoencoderConfig,
    AutoencoderKL,
    open_autoencoder,
)
from library.models.loading import LoadSpec, on_meta
from library.safetensors_io import save_file
from tools.make_tiny_models import AUTOENCODER, fill_randomly
from tools.other_layouts import diffusers_autoencoder_config, diffusers_autoencoder_state


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKL, DiffusersAutoencoder]:
    ours = AutoencoderKL(AUTOENCODER)
    fill_randomly(ours, 2, "parity")
    theirs = DiffusersAutoencoder.from_config(diffusers_autoencoder_config(AUTOENCODER))
    theirs.load_state_dict(diffusers_autoencoder_state(ours.state_dict(), AUTOENCODER), strict=True)
    return ours, theirs.eval()


def test_moments_and_images_are_the_same(pair):
    ours, theirs = pair
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.encode_moments(images)
        torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
        decoded = theirs.decode(mean).sample
        torch.testing.assert_close(ours.decode(LATENT_SCALE * (mean - LATENT_SHIFT)), decoded, atol=1e-5, rtol=1e-5)


def test_log_variances_are_clamped_as_in_diffusers(pair):
    ours, _ = pair
    wild = AutoencoderKL(AUTOENCODER)
    wild.load_state_dict(ours.state_dict())
    wild.encoder.conv_out.weight.data *= 1000
    _, logvar = wild.encode_moments(torch.rand(1, 3, 16, 16))
    assert logvar.min() == -30 and logvar.max() == 20


def test_an_image_is_encoded_the_same_alone_and_in_a_batch(pair):
    ours, _ = pair
    images = torch.rand(3, 3, 16, 24) * 2 - 1
    together = ours.encode(images, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = ours.encode(images[1:2], [torch.Generator().manual_seed(6)])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    other_noise = ours.encode(images[1:2], [torch.Generator().manual_seed(5)])
    assert (alone - other_noise).abs().max() > 1e-3


def test_samples_follow_the_posterior(pair):
    ours, _ = pair
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, logvar = ours.encode_moments(image)
    samples = torch.cat([ours.encode(image, [torch.Generator().manual_seed(seed)]) for seed in range(400)])
    unscaled = samples / LATENT_SCALE + LATENT_SHIFT
    deviation = torch.exp(0.5 * logvar)
    assert ((unscaled.mean(0) - mean[0]).abs() / deviation[0]).max() < 5 / 400**0.5
    torch.testing.assert_close(unscaled.std(0) / deviation[0], torch.ones_like(mean[0]), atol=0.25, rtol=0)


def test_every_layout_loads_to_the_same_weights(pair, tmp_path):
    ours, theirs = pair
    config = {"config": json.dumps({"norm_num_groups": AUTOENCODER.groups})}
    prefixed = {f"vae.{key}": value for key, value in ours.state_dict().items()}
    save_file(ours.state_dict(), tmp_path / "ae.safetensors", config)
    save_file(prefixed, tmp_path / "prefixed.safetensors", config)
    theirs.save_pretrained(tmp_path / "model" / "vae")
    for path in ("ae.safetensors", "prefixed.safetensors", "model", "model/vae"):
        opened = open_autoencoder(tmp_path / path)
        assert opened.config == AUTOENCODER
        loaded = opened.load(LoadSpec.of(torch.float32)).state_dict()
        assert loaded.keys() == ours.state_dict().keys()
        assert all(torch.equal(loaded[key], value) for key, value in ours.state_dict().items())


def test_the_full_size_model_has_the_known_keys():
    with on_meta():
        state = AutoencoderKL(AutoencoderConfig()).state_dict()
    assert len(state) == 244
    assert state["encoder.conv_out.weight"].shape == (32, 512, 3, 3)
    assert "encoder.down.1.block.0.nin_shortcut.weight" in state
    assert "decoder.up.1.upsample.conv.weight" in state and "decoder.up.0.upsample.conv.weight" not in state
    assert AutoencoderConfig().stride == 8
