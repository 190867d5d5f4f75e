"""The tiny pretrained Stable Diffusion 1.5 that ships with the project: its file, how it is made, and what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open

from library.models.stable_diffusion.pipeline import StableDiffusionPipeline, StableDiffusionRequest
from tools import tiny_sd15_training
from tools.build_tiny_flux import open_pipeline
from tools.score_concept import background_share, colour_mask
from tools.tiny_flux_drawings import COLOURS, WORDS, ordinary_images
from tools.tiny_sd15_training import (
    LOG_VARIANCE,
    KernelMuon,
    StableDiffusionPainter,
    export_sd15,
    open_sd15,
    orthogonal,
    reduced_autoencoder,
    train_sd15,
    train_sd15_autoencoder,
)

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SD15, FLUX = ASSETS / "tiny_sd15", ASSETS / "tiny_flux"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return open_sd15(SD15)


def test_the_file_is_small_and_in_the_originals_layout() -> None:
    assert sum(path.stat().st_size for path in SD15.rglob("*") if path.is_file()) < 7e6
    with safe_open(SD15 / "sd15-tiny.safetensors", "pt") as file:
        names = set(file.keys())
        config = json.loads(file.metadata()["config"])
    assert {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.0.0.skip_connection.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
    } < names
    assert config == {
        "unet": {"attention_head_dim": 2, "norm_num_groups": 8},
        "vae": {"norm_num_groups": 8},
        "text_encoder": {"num_attention_heads": 4},
    }


def test_each_word_is_one_token_of_the_tokenizer_beside_it(pipeline: StableDiffusionPipeline) -> None:
    tokenizer = pipeline.tokenizer("text_encoder")
    theirs = open_pipeline(FLUX).tokenizer("clip_l")
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer("a zog on a red background").input_ids == theirs("a zog on a red background").input_ids


@pytest.mark.parametrize(
    ("colour", "shape", "background"),
    [
        ("red", "circle", "blue"),
        pytest.param("yellow", "square", "purple", marks=pytest.mark.thorough),
        pytest.param("green", "triangle", "white", marks=pytest.mark.thorough),
    ],
)
def test_it_draws_what_the_prompt_says(
    pipeline: StableDiffusionPipeline, colour: str, shape: str, background: str
) -> None:
    prompt = f"a {colour} {shape} on a {background} background"
    request = StableDiffusionRequest(prompt, width=128, height=128, seed=1, sample_steps=12, scale=5.0)
    image = numpy.asarray(pipeline.generate(request))
    assert background_share(image, background) > 0.9
    assert colour_mask(image[60:68, 60:68], colour).mean() > 0.9
    assert all(colour_mask(image, other).mean() < 0.05 for other in COLOURS if other not in (colour, background))


def test_its_autoencoder_keeps_images(pipeline: StableDiffusionPipeline) -> None:
    images = [torch.from_numpy(numpy.array(image)) for image, _ in ordinary_images(4, 128, seed=9)]
    pixels = torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipeline.encode_images(pixels, None) * pipeline.latent_scale
    kept = pipeline.decode_latents(latents)
    assert (kept - pixels).square().mean() < 4 * 10**-2.8  # 28 dB
    assert 0.6 < latents.std() < 1.4


def test_four_directions_of_the_flux_latents_show_what_an_image_is() -> None:
    flux = open_pipeline(FLUX)
    autoencoder = reduced_autoencoder(flux, images=16)
    images = [torch.from_numpy(numpy.array(image)) for image, _ in ordinary_images(4, 128, seed=9)]
    pixels = torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        kept = autoencoder.decode(autoencoder.encode(pixels))
        assert (kept - pixels).square().mean() < 4 * 10**-2.3
        assert autoencoder.encoder(pixels)[:, 4:].eq(LOG_VARIANCE).all()


def test_steps_of_the_optimizer_are_those_of_torchs_own_for_matrices() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 8)]
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
    optimizers = [
        KernelMuon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for pair in zip(ours, theirs):
            gradient = torch.randn(pair[0].shape)
            for parameter in pair:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 5, 9)))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.thorough
def test_every_stage_runs_and_its_file_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_sd15_training, "BATCH", 4)
    flux = open_pipeline(FLUX)
    train_sd15_autoencoder(tmp_path, flux, 1, images=8)
    train_sd15(tmp_path, flux, 3, images=8)
    made = torch.load(tmp_path / "sd15.pt", weights_only=True)["modules"]["painter"]
    begun = StableDiffusionPainter(flux).state_dict()
    for name in (
        "clip.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "unet.down_blocks.1.resnets.0.conv2.weight",
    ):
        assert not torch.equal(made[name], begun[name])
    export_sd15(tmp_path, flux, tmp_path / "out")
    request = StableDiffusionRequest("a red circle", width=64, height=64, seed=1, sample_steps=1)
    assert open_sd15(tmp_path / "out").generate(request).size == (64, 64)
