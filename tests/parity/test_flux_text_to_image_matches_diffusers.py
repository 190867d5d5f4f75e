"""From prompt to image, the path gives what Diffusers' FluxPipeline gives: float32, within 1e-5 of the scale."""

from __future__ import annotations

import diffusers
import pytest
import torch

from library.models.flux.pipeline import FluxFiles, FluxPipeline, FluxRequest
from library.models.flux.transformer import pack_latents
from library.randomness import draw_noise, seeded_generator
from tools.make_tiny_models import make_tiny_flux

PROMPT = "a big red cat on the blue photo"
HEIGHT, WIDTH, STEPS, LENGTH = 48, 64, 4, 24


@pytest.fixture(scope="module", params=["dev", "schnell"])
def pair(request, tmp_path_factory) -> tuple[FluxPipeline, diffusers.FluxPipeline]:
    """Ours on the original files, theirs on the Diffusers folder: the same weights through different loaders."""
    original = make_tiny_flux(tmp_path_factory.mktemp("original"), request.param, "original", seed=4)
    folder = make_tiny_flux(tmp_path_factory.mktemp("diffusers"), request.param, "diffusers", seed=4).transformer
    ours = FluxPipeline(FluxFiles(**vars(original)), torch.float32, "cpu", t5xxl_max_token_length=LENGTH)
    theirs = diffusers.FluxPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def run_diffusers(pipeline: diffusers.FluxPipeline, output_type: str, **arguments) -> torch.Tensor:
    noise = draw_noise((HEIGHT * WIDTH // 256, 64), [seeded_generator(11)])
    return pipeline(
        PROMPT,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        max_sequence_length=LENGTH,
        latents=noise,
        output_type=output_type,
        **arguments,
    ).images


def request_for(pipeline: FluxPipeline, **arguments) -> FluxRequest:
    shift = pipeline.variant == "dev"
    return FluxRequest(PROMPT, width=WIDTH, height=HEIGHT, seed=11, sample_steps=STEPS, shift=shift, **arguments)


def assert_equal_to_scale(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1, "the reference must not be trivially small"
    assert (actual - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_conditioning_is_the_same(pair):
    ours, theirs = pair
    with torch.no_grad():
        states, pooled, ids = theirs.encode_prompt([PROMPT, ""], None, max_sequence_length=LENGTH)
    conditioning = ours.encode_prompts([PROMPT, ""])
    assert_equal_to_scale(conditioning["l_pooled"], pooled)
    assert_equal_to_scale(conditioning["t5_out"], states)
    assert torch.equal(conditioning["txt_ids"][0], ids)


def test_latents_and_image_are_the_same(pair):
    ours, theirs = pair
    request = request_for(ours, guidance_scale=2.5)
    latents = ours.generate_latents(request)
    assert_equal_to_scale(pack_latents(latents), run_diffusers(theirs, "latent", guidance_scale=2.5))
    expected = run_diffusers(theirs, "pt", guidance_scale=2.5)[0]
    assert (ours.decode_latents(latents)[0] / 2 + 0.5 - expected).abs().max() < 1e-4
    assert ours.generate(request).size == (WIDTH, HEIGHT)


def test_classifier_free_guidance_is_the_same(pair):
    ours, theirs = pair
    for negative in ("small dog", ""):
        expected = run_diffusers(theirs, "latent", true_cfg_scale=3.0, negative_prompt=negative)
        latents = ours.generate_latents(request_for(ours, negative_prompt=negative, scale=3.0))
        assert_equal_to_scale(pack_latents(latents), expected)
