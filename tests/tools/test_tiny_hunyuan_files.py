"""The tiny pretrained HunyuanImage-2.1 that ships with the project: its files, how they are made, what it draws."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open

from library.models.hunyuan_image.pipeline import HunyuanImagePipeline, HunyuanImageRequest
from tools import tiny_hunyuan_training
from tools.score_concept import background_share, colour_mask
from tools.tiny_flux_drawings import COLOURS, WORDS, random_scene
from tools.tiny_hunyuan_drawings import LETTERS, LetteredScene, draw_lettered, with_letter, written_letter
from tools.tiny_hunyuan_training import (
    FILES,
    PIXELS,
    HunyuanPainter,
    export_hunyuan,
    open_hunyuan,
    train_hunyuan,
    train_hunyuan_autoencoder,
)

HUNYUAN = Path(__file__).resolve().parents[2] / "assets" / "tiny_hunyuan_image"


@pytest.fixture(scope="module")
def pipeline() -> HunyuanImagePipeline:
    return open_hunyuan(HUNYUAN)


def drawn(pipeline: HunyuanImagePipeline, prompt: str, **settings: Any) -> numpy.ndarray:
    """An image of ``prompt``, [128, 128, 3] uint8."""
    request = HunyuanImageRequest(prompt, width=PIXELS, height=PIXELS, seed=1, sample_steps=12, **settings)
    return numpy.asarray(pipeline.generate(request))


def test_the_files_are_small_and_in_the_originals_layout() -> None:
    assert sum(path.stat().st_size for path in HUNYUAN.rglob("*") if path.is_file()) < 1e7
    wanted = {
        "transformer": {"double_blocks.0.img_attn_qkv.weight", "byt5_in.fc3.weight", "single_blocks.0.linear1.weight"},
        "text_encoder": {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"},
        "byt5": {"shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"},
        "autoencoder": {"encoder.down.4.downsample.conv.weight", "decoder.up.4.upsample.conv.weight"},
    }
    for part, name in FILES.items():
        with safe_open(HUNYUAN / name, "pt") as file:
            names = set(file.keys())
            assert wanted[part] < names
            assert {file.get_tensor(name).dtype for name in names} == {torch.float16}


def test_each_word_is_one_token_as_the_training_took_it(pipeline: HunyuanImagePipeline, tmp_path: Path) -> None:
    painter, shipped = HunyuanPainter(tmp_path), pipeline.tokenizer("text_encoder")
    prompt = with_letter("a zog on an orange background", "T")
    assert shipped(prompt).input_ids == painter.tokenizer(prompt).input_ids
    assert all(len(shipped(f" {word}").input_ids) == 1 for word in (*WORDS, "with"))


@pytest.mark.parametrize(
    ("colour", "shape", "background"),
    [
        ("red", "circle", "blue"),
        pytest.param("yellow", "square", "purple", marks=pytest.mark.thorough),
        pytest.param("green", "triangle", "white", marks=pytest.mark.thorough),
    ],
)
def test_it_draws_what_the_prompt_says(
    pipeline: HunyuanImagePipeline, colour: str, shape: str, background: str
) -> None:
    image = drawn(pipeline, f"a {colour} {shape} on a {background} background", scale=1.0)
    assert background_share(image, background) > 0.9
    assert colour_mask(image[60:68, 60:68], colour).mean() > 0.9
    assert all(colour_mask(image, other).mean() < 0.05 for other in COLOURS if other not in (colour, background))
    assert written_letter(image, background) is None


def test_a_letter_can_be_read_where_it_is_drawn() -> None:
    source = random.Random(5)
    for letter in (None, *LETTERS):
        for _ in range(8):
            scene = random_scene(source)
            assert written_letter(draw_lettered(LetteredScene(scene, letter), PIXELS), scene.background) == letter


def test_the_glyphs_alone_say_which_letter_is_written(pipeline: HunyuanImagePipeline) -> None:
    """Each image has the letter of its glyphs, whatever the prompt quotes for Qwen2.5-VL; without glyphs, none."""
    plain = "a red circle on a blue background"
    read = {letter: pipeline.encode_prompts([with_letter(plain, letter)]) for letter in (None, "A", "T", "X")}
    assert [int(texts["byt5_mask"].sum()) for texts in read.values()] == [0, 11, 11, 11]

    def written(seen: str | None, glyphs: str | None) -> str | None:
        mixed = read[seen] | {name: value for name, value in read[glyphs].items() if not name.startswith("vlm")}
        return written_letter(drawn(pipeline, with_letter(plain, glyphs), conditioning=mixed), "blue")

    assert [written("A", glyphs) for glyphs in ("A", "T", "X")] == ["A", "T", "X"]
    assert written("X", "T") == "T" and written(None, None) is None


def test_every_stage_runs_and_its_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_hunyuan_training, "AUTOENCODER_IMAGES", 6)
    train_hunyuan_autoencoder(tmp_path, 2, 1)
    monkeypatch.setattr(tiny_hunyuan_training, "BATCH", 6)
    train_hunyuan(tmp_path, 3, images=8)
    made = torch.load(tmp_path / "hunyuan.pt", weights_only=True)["modules"]["painter"]
    begun = HunyuanPainter(tmp_path).state_dict()
    for name in ("qwen.layers.0.self_attn.q_proj.weight", "byt5.encoder.final_layer_norm.weight"):
        assert not torch.equal(made[name], begun[name])
    export_hunyuan(tmp_path, tmp_path / "out")
    request = HunyuanImageRequest('a red circle with "A"', width=64, height=64, seed=1, sample_steps=1)
    assert open_hunyuan(tmp_path / "out").generate(request).size == (64, 64)
