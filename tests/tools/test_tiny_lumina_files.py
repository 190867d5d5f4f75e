"""The tiny pretrained Lumina Image 2.0 that ships with the project: its files, how they are made, and what it draws."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open

from library.models.lumina.pipeline import LuminaPipeline, LuminaRequest
from library.models.lumina.text import with_system_prompt
from tools import tiny_lumina_training
from tools.build_tiny_flux import open_pipeline
from tools.score_concept import background_share, colour_mask
from tools.tiny_flux_drawings import COLOURS, WORDS
from tools.tiny_lumina_training import SYSTEM_PROMPTS, LuminaPainter, export_lumina, open_lumina, train_lumina

ASSETS = Path(__file__).resolve().parents[2] / "assets"
LUMINA, FLUX = ASSETS / "tiny_lumina", ASSETS / "tiny_flux"


@pytest.fixture(scope="module")
def pipeline() -> LuminaPipeline:
    return open_lumina(LUMINA, FLUX)


def test_the_files_are_small_and_in_the_originals_layout() -> None:
    assert sum(path.stat().st_size for path in LUMINA.rglob("*") if path.is_file()) < 5e6
    with safe_open(LUMINA / "lumina-tiny.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert {
        "cap_embedder.1.weight",
        "layers.0.attention.qkv.weight",
        "context_refiner.0.feed_forward.w3.weight",
    } < names
    with safe_open(LUMINA / "gemma2.safetensors", "pt") as file:
        assert file.get_slice("spiece_model").get_dtype() == "U8"
        assert "model.layers.0.post_feedforward_layernorm.weight" in set(file.keys())


def test_each_word_is_one_piece_as_the_training_took_it(pipeline: LuminaPipeline) -> None:
    """The tokenizer in the file gives the ids with which the model was trained."""
    painter = LuminaPainter()
    prompts = ["", "a zog on an orange background", with_system_prompt("a big red ring", SYSTEM_PROMPTS[1])]
    ids, mask = painter.tokenize(prompts)
    tokens = pipeline.tokenizer("gemma2")(prompts, padding="longest", return_tensors="pt")
    assert torch.equal(tokens.input_ids, ids) and torch.equal(tokens.attention_mask, mask)
    for word in WORDS:
        assert len(painter.pieces.encode(f"a {word}")) == 2, word
    assert not any(painter.pieces.is_byte(piece) for piece in ids.flatten().tolist())


@pytest.mark.parametrize(
    ("colour", "shape", "background", "system"),
    [
        ("red", "circle", "blue", ""),
        ("yellow", "square", "purple", SYSTEM_PROMPTS[0]),
        pytest.param("green", "triangle", "white", "", marks=pytest.mark.thorough),
    ],
)
def test_it_draws_what_the_prompt_says(
    pipeline: LuminaPipeline, colour: str, shape: str, background: str, system: str
) -> None:
    prompt = with_system_prompt(f"a {colour} {shape} on a {background} background", system)
    image = numpy.asarray(pipeline.generate(LuminaRequest(prompt, width=128, height=128, seed=1, sample_steps=12)))
    assert background_share(image, background) > 0.9
    assert colour_mask(image[60:68, 60:68], colour).mean() > 0.9
    assert all(colour_mask(image, other).mean() < 0.05 for other in COLOURS if other not in (colour, background))


def test_every_stage_runs_and_its_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_lumina_training, "BATCH", 4)
    train_lumina(tmp_path, open_pipeline(FLUX), 2, images=8)
    made = torch.load(tmp_path / "lumina.pt", weights_only=True)["modules"]["painter"]
    begun = LuminaPainter().state_dict()
    for name in ("gemma.layers.0.self_attn.q_proj.weight", "transformer.layers.0.adaLN_modulation.1.weight"):
        assert not torch.equal(made[name], begun[name])
    export_lumina(tmp_path, tmp_path / "out")
    request = LuminaRequest("a red circle", width=64, height=64, seed=1, sample_steps=1)
    assert open_lumina(tmp_path / "out", FLUX).generate(request).size == (64, 64)
