"""HunyuanImage-2.1's autoencoder: strips and tiles give the image, files of another kind are named, NaN stays NaN."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from library.errors import UserError
from library.memory.simulation import PeakMemory
from library.models.autoencoder_hunyuan import (
    HunyuanAutoencoder,
    HunyuanAutoencoderConfig,
    depth_to_space,
    in_tiles,
    open_hunyuan_autoencoder,
    space_to_depth,
    tile_starts,
)
from library.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL, open_autoencoder
from library.models.autoencoder_parts import ResnetBlock
from library.models.loading import LoadSpec
from library.models.stable_diffusion.checkpoint import open_vae
from library.safetensors_io import save_file
from tools.tiny_hunyuan_autoencoder import (
    HUNYUAN_AUTOENCODER,
    diffusers_hunyuan_autoencoder_state,
    tiny_hunyuan_autoencoder,
)
from tools.tiny_parts import fill_randomly

SMALL = HunyuanAutoencoderConfig((8, 16, 16), res_blocks=1, latent_channels=4, groups=4)
"""Stride 4: maps of few rows at every level."""


@pytest.fixture(scope="module")
def small() -> HunyuanAutoencoder:
    autoencoder = HunyuanAutoencoder(SMALL)
    fill_randomly(autoencoder, 0, "small")
    return autoencoder.eval()


@pytest.fixture(autouse=True)
def whole_again(small):
    small.set_chunk_size(None)
    small.set_tile_size(None)


def pixels(height: int, width: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1


# ---- strips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@torch.no_grad()
def test_strips_give_the_whole_at_every_height(rows):
    """Heights just below, at and above the strips' on each level, and last strips of any number of rows."""
    autoencoder = HunyuanAutoencoder(HunyuanAutoencoderConfig((8, 16), res_blocks=1, latent_channels=4, groups=4))
    fill_randomly(autoencoder, 0, "strips")
    for height in range(2, 2 * rows + 10, 2):
        images = pixels(height, 4)
        autoencoder.set_chunk_size(None)
        moments = autoencoder.moments(images)
        decoded = autoencoder.decode(moments[:, :4])
        autoencoder.set_chunk_size(rows)
        torch.testing.assert_close(autoencoder.moments(images), moments, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(autoencoder.decode(moments[:, :4]), decoded, atol=1e-5, rtol=1e-5)


def test_maps_of_no_more_rows_than_a_strip_are_computed_at_once(small):
    images = pixels(16, 24)
    whole = small.moments(images)
    small.set_chunk_size(16)
    assert torch.equal(small.moments(images), whole)
    small.set_chunk_size(15)
    assert not torch.equal(small.moments(images), whole)


def test_strips_change_neither_images_nor_latents_that_they_are_given(small):
    small.set_chunk_size(3)
    images = pixels(24, 8)
    kept = images.clone()
    latents = small.encode(images)
    given = latents.clone()
    small.decode(latents)
    assert torch.equal(images, kept) and torch.equal(latents, given)


def test_strips_of_a_shortcut_that_changes_channels_are_the_whole():
    block = ResnetBlock(8, 16, 4)
    fill_randomly(block, 0, "block")
    x = torch.randn(1, 8, 13, 5, generator=torch.Generator().manual_seed(0))
    whole = block(x)
    block.strip_rows = 4
    torch.testing.assert_close(block(x), whole, atol=1e-5, rtol=1e-5)


def test_half_precision_in_strips_is_as_close_to_the_exact_as_the_whole(small):
    """Sums over a strip don't lose what sums over a map keep."""
    latents = torch.randn(1, 4, 12, 6, generator=torch.Generator().manual_seed(0))
    exact = small.decode(latents)
    half = HunyuanAutoencoder(SMALL)
    half.load_state_dict(small.state_dict())
    half.bfloat16()
    off = []
    for rows in (None, 5):
        half.set_chunk_size(rows)
        off.append((half.decode(latents).float() - exact).pow(2).mean().sqrt())
    assert 0 < off[1] < 1.2 * off[0]


def peak(rows: int | None, work: str) -> float:
    """The memory that work takes beside the weights, in maps of the full resolution."""
    config = HunyuanAutoencoderConfig((32, 32), res_blocks=1, latent_channels=8, groups=4)
    with FakeTensorMode(), torch.no_grad():
        autoencoder = HunyuanAutoencoder(config)
        autoencoder.set_chunk_size(rows)
        given = torch.empty(1, 3, 40, 32) if work == "encode" else torch.empty(1, 8, 20, 16)
        with PeakMemory([autoencoder, given]) as memory:
            autoencoder.encode_moments(given) if work == "encode" else autoencoder.decode(given)
    return memory.peak.device / (4 * 32 * 40 * 32)


@pytest.mark.parametrize("work", ["encode", pytest.param("decode", marks=pytest.mark.thorough)])
def test_strips_leave_two_maps_and_a_strip_in_memory(work):
    """Neither norms nor convolutions nor a list of strips take a third; computed at once, there are four."""
    assert peak(None, work) > 3.9
    assert peak(4, work) < 2.6


def test_attention_in_strips_never_holds_all_scores():
    def largest(rows: int | None) -> int:
        autoencoder = HunyuanAutoencoder(HunyuanAutoencoderConfig((32,), res_blocks=0, latent_channels=4))
        autoencoder.set_chunk_size(rows)
        sizes = []
        attend = F.scaled_dot_product_attention

        def watched(query, key, value):
            sizes.append(query.shape[2] * key.shape[2])
            return attend(query, key, value)

        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", watched)
            autoencoder.decode(torch.zeros(1, 4, 20, 10))
        return max(sizes)

    assert largest(None) == 200 * 200
    assert largest(3) == 30 * 200


@pytest.mark.parametrize("rows", [0, -16])
def test_a_strip_without_rows_is_refused(small, rows):
    with pytest.raises(ValueError, match="at least one row"):
        small.set_chunk_size(rows)


# ---- tiles -----------------------------------------------------------------------------------------------------------


def test_tiles_cover_every_size_with_at_least_their_overlap():
    for tile in range(1, 9):
        for overlap in range(tile // 2 + 1):
            for size in range(1, 40):
                starts = list(tile_starts(size, tile, overlap))
                assert starts[0] == (0, 0)
                if size <= tile:
                    assert len(starts) == 1
                    continue
                assert starts[-1][0] + tile == size
                for (before, _), (start, shared) in pairwise(starts):
                    assert before < start and before + tile - start == shared >= overlap


def test_tiles_of_a_local_layer_are_the_whole_to_rounding_and_of_a_constant_one_to_the_bit():
    enlarge = torch.nn.Upsample(scale_factor=3, mode="nearest")
    x = torch.randn(2, 4, 19, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_tiles(enlarge, x, 1, 3, 6, 2), enlarge(x), atol=1e-6, rtol=1e-6)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        constant = torch.full((1, 4, 19, 11), 0.1, dtype=dtype)
        assert torch.equal(in_tiles(enlarge, constant, 1, 3, 6, 2), enlarge(constant))
    shrink = torch.nn.AvgPool2d(3)
    x = torch.randn(1, 4, 57, 33, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_tiles(shrink, x, 3, 1, 6, 3), shrink(x), atol=1e-6, rtol=1e-6)


def test_tiles_of_a_convolution_are_the_whole_inside_each_tile():
    """Away from the seams; at them, the zeros around a tile show, with the weight of the fade."""
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 16, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, tiled = conv(x), in_tiles(conv, x, 1, 1, 16, 4)
    torch.testing.assert_close(tiled[..., :12], whole[..., :12], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tiled[..., 16:], whole[..., 16:], atol=1e-6, rtol=1e-6)
    seam = (tiled - whole)[..., 12:16].abs()
    assert 0 < seam.max() < (whole.abs().max())


def test_images_and_latents_in_tiles_are_the_tiles_beside_the_seams_and_fade_between(small):
    images = pixels(32, 56)
    latents = small.encode(images)
    tiles = [slice(0, 8), slice(6, 14)]
    alone = [small.decode(latents[..., columns]) for columns in tiles]
    small.set_tile_size(32)
    decoded, encoded = small.decode(latents), small.moments(images)
    assert decoded.shape == images.shape and encoded.shape == (1, 8, 8, 14)
    torch.testing.assert_close(decoded[..., :24], alone[0][..., :24])
    torch.testing.assert_close(decoded[..., 32:], alone[1][..., 8:])
    fade = (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(decoded[..., 24:32], (1 - fade) * alone[0][..., 24:] + fade * alone[1][..., :8])
    small.set_tile_size(None)
    torch.testing.assert_close(encoded[..., :6], small.moments(images[..., :32])[..., :6])
    torch.testing.assert_close(encoded[..., 8:], small.moments(images[..., 24:])[..., 2:])


def test_an_image_of_one_tile_is_the_whole_and_tiles_are_off_by_default(small):
    images = pixels(32, 24)
    latents = small.encode(images)
    whole = small.decode(latents)
    assert small.tile is None
    small.set_tile_size(32)
    assert torch.equal(small.encode(images), latents) and torch.equal(small.decode(latents), whole)


@pytest.mark.parametrize(("side", "overlap"), [(30, 0.25), (0, 0.25), (32, 0.6), (32, -0.1)])
def test_tiles_that_cannot_be_are_refused(small, side, overlap):
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        small.set_tile_size(side, overlap)


# ---- sampling and numbers --------------------------------------------------------------------------------------------


def test_squares_of_pixels_and_channels_are_each_others_way_back():
    x = torch.randn(2, 8, 6, 10)
    assert torch.equal(depth_to_space(space_to_depth(x)), x)
    assert torch.equal(space_to_depth(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten(), torch.arange(4.0))


def test_an_image_is_sampled_with_its_own_generator_unscaled(small):
    images = pixels(16, 24, 3)
    mean, logvar = small.encode_moments(images)
    samples = small.encode(images, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(samples[1], mean[1] + torch.exp(0.5 * logvar[1]) * noise)
    assert torch.equal(small.encode(images), mean)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        small.encode(images, [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("rows", [None, 4])
def test_an_overflow_is_not_hidden(small, rows):
    """Callers look for values that are not finite; neither strips nor the clamp of the variance may take them away."""
    wild = HunyuanAutoencoder(SMALL)
    wild.load_state_dict(small.state_dict())
    wild.half()
    for part in (wild.encoder, wild.decoder):
        part.mid.block_1.conv1.weight.data.fill_(60000)
    wild.set_chunk_size(rows)
    with torch.no_grad():
        assert not wild.encode(pixels(16, 8)).isfinite().all()
        assert not wild.decode(torch.ones(1, 4, 8, 4)).isfinite().all()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return tiny_hunyuan_autoencoder(dtype=torch.float16)


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoders")
    flux = AutoencoderKL(AutoencoderConfig(channels=32, multipliers=(1, 2), res_blocks=1)).state_dict()
    save_file(flux, folder / "flux.safetensors")
    save_file(tiny, folder / "hunyuan.safetensors")
    diffusers = diffusers_hunyuan_autoencoder_state(tiny, HUNYUAN_AUTOENCODER)
    save_file(diffusers, folder / "hunyuan_diffusers.safetensors")
    return folder


def test_another_familys_autoencoder_is_named(files):
    with pytest.raises(
        UserError, match=r"^--vae: .*flux\.safetensors is a FLUX autoencoder \(AE\); HunyuanImage-2\.1's"
    ):
        open_hunyuan_autoencoder(files / "flux.safetensors", option="--vae")
    for name in ("hunyuan.safetensors", "hunyuan_diffusers.safetensors"):
        with pytest.raises(UserError, match=rf"^--ae: .*{name} is a HunyuanImage autoencoder.*; a FLUX autoencoder"):
            open_autoencoder(files / name, option="--ae")
        with pytest.raises(UserError, match="is a HunyuanImage autoencoder.*; a Stable Diffusion autoencoder"):
            open_vae(files / name, "sd1")


def refused(state: dict[str, torch.Tensor], folder, **config: str) -> str:
    save_file(state, folder / "vae.safetensors", config or None)
    with pytest.raises(UserError) as error:
        open_hunyuan_autoencoder(folder / "vae.safetensors").load(LoadSpec())
    message = str(error.value)
    assert message.startswith(str(folder / "vae.safetensors")) and "\n" not in message
    return message


def test_files_that_lack_something_or_have_more_are_refused(tiny, tmp_path):
    lacking = {key: value for key, value in tiny.items() if "decoder.mid.attn_1.k" not in key}
    assert "2 tensors are missing (decoder.mid.attn_1.k.bias" in refused(lacking, tmp_path)
    more = {**tiny, "encoder.down.5.downsample.conv.weight": torch.zeros(4, 4, 3, 3)}
    assert "1 tensor is unexpected (encoder.down.5.downsample.conv.weight)" in refused(more, tmp_path)
    deep = {**tiny, "encoder.mid.block_1.conv1.weight": torch.zeros(128, 128, 3, 3, 3)}
    assert "encoder.mid.block_1.conv1.weight" in refused(deep, tmp_path)
    assert "decoder.up.0.upsample.conv.weight" in refused(
        {**tiny, "decoder.up.0.upsample.conv.weight": torch.zeros(128, 128, 3, 3)}, tmp_path
    )


def test_widths_that_shortcuts_cannot_connect_are_refused(tiny, tmp_path):
    odd = {
        key: value[:96] if re.match(r"encoder\.down\.5\.block\.0\.conv1", key) else value for key, value in tiny.items()
    }
    assert "which no shortcuts can connect" in refused(odd, tmp_path)


def test_a_configuration_that_groups_cannot_fit_is_refused(tiny, tmp_path):
    assert "cannot be split into 48 norm groups" in refused(tiny, tmp_path, config='{"norm_num_groups": 48}')
