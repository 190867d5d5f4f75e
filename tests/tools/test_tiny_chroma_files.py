"""The tiny pretrained Chroma that ships with the project: its files, how they are made, and what it draws."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open

from library.models.flux.pipeline import FluxPipeline, FluxRequest
from tools import tiny_chroma_training
from tools.score_concept import background_share, colour_mask
from tools.tiny_chroma_training import (
    ChromaPainter,
    export_chroma,
    open_chroma,
    teacher_modulations,
    train_approximator,
    train_chroma,
    train_text,
)
from tools.tiny_flux_drawings import COLOURS

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CHROMA, FLUX = ASSETS / "tiny_chroma", ASSETS / "tiny_flux"


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return open_chroma(CHROMA, FLUX)


@pytest.fixture
def teacher() -> FluxPipeline:
    from tools.build_tiny_flux import open_pipeline

    return open_pipeline(FLUX)


def test_the_files_are_small_and_in_chromas_layout(pipeline: FluxPipeline) -> None:
    assert sum(path.stat().st_size for path in CHROMA.rglob("*") if path.is_file()) < 4.5e6
    with safe_open(CHROMA / "chroma-tiny.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert "distilled_guidance_layer.norms.0.scale" in names
    assert not any(part in name for name in names for part in ("_mod.", "modulation", "time_in", "vector_in"))
    assert pipeline.variant == "chroma" and pipeline.encoders == ("t5xxl",)


@pytest.mark.parametrize(
    ("colour", "shape", "background"),
    [
        ("red", "circle", "blue"),
        pytest.param("yellow", "square", "purple", marks=pytest.mark.thorough),
        pytest.param("green", "triangle", "white", marks=pytest.mark.thorough),
    ],
)
def test_it_draws_what_the_prompt_says(pipeline: FluxPipeline, colour: str, shape: str, background: str) -> None:
    prompt = f"a {colour} {shape} on a {background} background"
    size = {"width": 128, "height": 128, "seed": 1, "sample_steps": 12}
    image = numpy.asarray(pipeline.generate(FluxRequest(prompt, negative_prompt="blurry", scale=2.0, **size)))
    assert background_share(image, background) > 0.9
    middle = image[60:68, 60:68]
    assert colour_mask(middle, colour).mean() > 0.9
    assert all(colour_mask(image, other).mean() < 0.05 for other in COLOURS if other not in (colour, background))


def test_with_flux_modulations_it_is_the_flux_it_was_made_from(teacher: FluxPipeline) -> None:
    """So the order of the vectors that the approximator learns is that in which the blocks read them."""
    painter, flux = ChromaPainter(teacher), teacher.load_transformer()
    made = torch.Generator().manual_seed(0)
    tokens, text = torch.randn(2, 16, 64, generator=made), torch.randn(2, 8, 64, generator=made)
    pooled, times = torch.randn(1, 64, generator=made), torch.tensor([0.3, 0.9])
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    painter.transformer.modulations = lambda times: teacher_modulations(flux, times, pooled)  # type: ignore[method-assign]
    with torch.no_grad():
        ours = painter.transformer(tokens, ids, text, torch.zeros(8, 3), times, txt_attention_mask=torch.ones(2, 8))
        theirs = flux(tokens, ids, text, torch.zeros(8, 3), times, pooled.expand(2, -1), torch.full((2,), 2.5))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_every_stage_runs_and_its_files_open(
    teacher: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_chroma_training, "BATCH", 4)
    train_text(tmp_path, teacher, 2)
    train_approximator(tmp_path, teacher, 2)
    train_chroma(tmp_path, teacher, 2, images=8)
    made = torch.load(tmp_path / "chroma.pt", weights_only=True)["modules"]["painter"]
    begun = ChromaPainter(teacher).state_dict()
    for name in (
        "t5.encoder.block.0.layer.0.SelfAttention.q.weight",
        "transformer.double_blocks.0.img_attn.qkv.weight",
    ):
        assert not torch.equal(made[name], begun[name])
    export_chroma(tmp_path, teacher, tmp_path / "out")
    pipeline = open_chroma(tmp_path / "out", FLUX)
    assert pipeline.generate(FluxRequest("a red circle", width=64, height=64, seed=1, sample_steps=1)).size == (
        64,
        64,
    )
