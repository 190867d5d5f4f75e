"""The tiny pretrained FLUX.1 that ships with the project: its files, its tokenizers and what it draws."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from library.models.flux.pipeline import FluxFiles, FluxPipeline, FluxRequest
from tools.score_concept import background_share, colour_mask
from tools.tiny_flux_drawings import COLOURS, WORDS, concept_images

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "tiny_flux"
NAMES = ("flux1-tiny.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl.safetensors")


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    transformer, autoencoder, clip_l, t5xxl = (FOLDER / name for name in NAMES)
    files = FluxFiles(transformer, autoencoder, clip_l, t5xxl, tokenizer_cache_dir=FOLDER / "tokenizers")
    return FluxPipeline(files, torch.float32, "cpu", t5xxl_max_token_length=16)


def test_all_files_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8e6


def test_every_word_of_the_captions_is_one_token_and_the_concept_is_spelled(pipeline: FluxPipeline) -> None:
    for word in WORDS:
        tokens = pipeline.tokenize([word])
        assert (tokens["l_tokens"][0] != pipeline.tokenizers["clip_l"].eos_token_id).sum() == 2  # start and word
        assert tokens["t5_attn_mask"].sum() == 2  # word and end
    assert pipeline.tokenize(["zog"])["t5_attn_mask"].sum() == 5


def test_no_printable_character_is_unknown_to_t5(pipeline: FluxPipeline) -> None:
    pipeline.load_tokenizers()
    tokenizer = pipeline.tokenizers["t5xxl"]
    text = " ".join(chr(code) for code in range(33, 127))
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_latents_have_unit_variance_and_images_survive_the_autoencoder(pipeline: FluxPipeline) -> None:
    images = numpy.stack([numpy.asarray(image) for image, _ in concept_images(5, 128, seed=9)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipeline.encode_images(pixels, None)
    assert latents.shape == (5, 16, 16, 16)
    assert 0.8 < latents.std() < 1.3 and abs(latents.mean()) < 0.2
    error = (pipeline.decode_latents(latents) - pixels) / 2
    assert -10 * torch.log10(error.square().mean()) > 25


@pytest.mark.parametrize(
    ("colour", "shape", "background"),
    [
        ("red", "circle", "blue"),
        pytest.param("yellow", "square", "purple", marks=pytest.mark.thorough),
        pytest.param("green", "triangle", "white", marks=pytest.mark.thorough),
    ],
)
def test_the_base_draws_what_the_prompt_says(pipeline: FluxPipeline, colour: str, shape: str, background: str) -> None:
    prompt = f"a {colour} {shape} on a {background} background"
    request = FluxRequest(prompt, width=128, height=128, seed=1, sample_steps=12, guidance_scale=1.0)
    image = numpy.asarray(pipeline.generate(request))
    assert background_share(image, background) > 0.9
    middle = image[60:68, 60:68]
    assert colour_mask(middle, colour).mean() > 0.9
    assert all(colour_mask(image, other).mean() < 0.05 for other in COLOURS if other not in (colour, background))
