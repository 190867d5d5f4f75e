"""--vae_slices: the autoencoder of Stable Diffusion in slices gives what it gives whole, and needs less memory."""

from __future__ import annotations

import math

import pytest
import torch

from library.models.autoencoder_slices import in_slices
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline


def open_pipeline(path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(path), torch.float32, "cpu")


@pytest.fixture(scope="module")
def pipeline(few_blocks_sd1) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sd1)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "slices"), [((72, 64), 2), ((72, 64), 5), ((72, 64), 72), ((128, 104), 3), ((128, 104), 16)]
)
def test_slices_give_the_whole(pipeline, slices, size):
    """Also where slices are of unequal height, of odd height, and of a row."""
    height, width = size
    pixels, latents = noise(2, 3, height, width).clamp(-1, 1), noise(2, 4, height // 8, width // 8)
    whole = pipeline.encode_images(pixels, None), pipeline.decode_latents(latents)
    kept = pixels.clone(), latents.clone()
    pipeline.vae_slices = slices
    try:
        sliced = pipeline.encode_images(pixels, None), pipeline.decode_latents(latents)
    finally:
        pipeline.vae_slices = None
    assert sliced[0].shape == whole[0].shape and sliced[1].shape == (2, 3, height, width)
    for ours, reference in zip(sliced, whole):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=2e-5)
    assert torch.equal(pixels, kept[0]) and torch.equal(latents, kept[1])


def test_convolutions_see_a_slice_and_the_rows_beside_it(pipeline):
    """16 slices of an image 128 high have 8 rows on every level."""
    heights: set[int] = set()
    autoencoder = pipeline.load_autoencoder()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            if function is torch.nn.functional.conv2d and arguments[1].shape[-1] == 3:
                heights.add(arguments[0].shape[2])
            return function(*arguments, **(keywords or {}))

    with torch.no_grad(), in_slices(autoencoder, 16, 128), Watch():
        autoencoder.decode(noise(1, 4, 16, 16))
    assert max(heights) == 10
    heights.clear()
    with torch.no_grad(), in_slices(autoencoder, 16, 128), Watch():
        autoencoder.encode(noise(1, 3, 128, 64))
    assert max(heights) == 17  # twice the rows, for the convolutions that halve the size
    heights.clear()
    with torch.no_grad(), Watch():
        autoencoder.decode(noise(1, 4, 16, 16))
    assert max(heights) == 128, "afterwards, everything is as it was"


@pytest.mark.parametrize(
    ("size", "batches"), [(None, [5]), (2, [2, 2, 1]), (2.9, [2, 2, 1]), (0.5, [2, 2, 1]), (0.1, [1] * 5)]
)
def test_images_go_through_the_autoencoder_vae_batch_size_at_a_time(pipeline, monkeypatch, size, batches):
    """--vae_batch_size: a number of images, or a share of the batch."""
    autoencoder, seen = pipeline.load_autoencoder(), []
    for name in ("encode", "decode"):
        own = getattr(autoencoder, name)
        monkeypatch.setattr(autoencoder, name, lambda x, own=own: (seen.append(len(x)), own(x))[1])
    pixels, latents = noise(5, 3, 64, 64), noise(5, 4, 8, 8)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    whole = pipeline.encode_images(pixels, generators), pipeline.decode_latents(latents)
    monkeypatch.setattr(pipeline, "vae_batch_size", size)
    seen.clear()
    again = [torch.Generator().manual_seed(seed) for seed in range(5)]
    split = pipeline.encode_images(pixels, again), pipeline.decode_latents(latents)
    assert seen == [*batches, *batches] and sum(batches) == 5 and math.ceil(5 / batches[0]) == len(batches)
    for ours, reference in zip(split, whole):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
