"""The course of gen_img.py: batches change no image, texts are encoded once, a session goes on, memory is fitted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import gen_img
from library.errors import UserError
from library.generation.fitting import phases_of
from library.options import parse_options
from tests.generation.drawing import pixels

SMALL = ("--W", "64", "--H", "64", "--steps", "3")


def run(model: Path, folder: Path, *arguments: object) -> gen_img.GenImg:
    """The script's run, ready to draw."""
    words = ["--ckpt", model, "--outdir", folder, "--device", "cpu", "--sequential_file_name", *SMALL, *arguments]
    return gen_img.GenImg(parse_options(gen_img.GenImgOptions, "", [str(word) for word in words]))


@pytest.fixture
def shared(share_parts) -> Callable[..., gen_img.GenImg]:
    """The script's run with the parts that others have loaded."""
    return lambda *arguments: share_parts(run(*arguments))


def drawn(folder: Path) -> list[bytes]:
    return [pixels(path) for path in sorted(folder.glob("*.png"))]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    lines = ["a cat --n dog --d 1,2", "the (photo:1.3) of a bird --d 3,4", "a cat --l 1 --d 5,6", "a BREAK b --d 7,8"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_images_are_the_same_in_batches_of_any_size(few_blocks_sd1, shared, prompts, tmp_path):
    """--batch_size: texts of different lengths and different guidance are never drawn together."""
    given = ("--from_file", prompts, "--images_per_prompt", "2", "--sampler", "euler_a", "--steps", "2")
    images = []
    for size in ("1", "4"):
        folder = tmp_path / size
        shared(few_blocks_sd1, folder, *given, "--max_embeddings_multiples", "2", "--batch_size", size).run()
        images.append(drawn(folder))
    alone, together = images
    assert len(alone) == len(set(alone)) == 8
    for one, other in zip(alone, together):
        differences = [abs(a - b) for a, b in zip(one, other)]
        assert max(differences) <= 2, "but for the last bits of a matrix product"


def test_each_distinct_text_is_encoded_once(few_blocks_sd1, prompts, tmp_path):
    script = run(
        few_blocks_sd1, tmp_path / "out", "--from_file", prompts, "--n_iter", "2", "--batch_size", "3", "--steps", "1"
    )
    encoder, calls = script.pipeline.load("text_encoder"), []
    encoder.text_model.register_forward_pre_hook(lambda *_: calls.append(1))
    script.run()
    assert len(drawn(tmp_path / "out")) == 8
    texts = {"a cat", "dog", "the (photo:1.3) of a bird", "", "a BREAK b"}
    assert len(calls) == len(texts)


def test_a_session_goes_on_after_mistakes(few_blocks_sd1, shared, tmp_path, monkeypatch, capsys):
    """--interactive, with --no_preview."""
    lines = iter(["a cat --w 65", "", "--n only this", "a cat --t 3 --d 1", "a cat --d 1 --s 2", "a dog --d 2 --s 2"])

    def answer(question: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    shared(few_blocks_sd1, tmp_path / "out", "--interactive", "--no_preview").run()
    assert len(drawn(tmp_path / "out")) == 2
    said = capsys.readouterr().out
    assert said.count("error: ") == 2 and "--w must be" in said and "between 0 and 1, but is 3" in said


def test_memory_is_planned_for_a_whole_batch(few_blocks_sdxl, tmp_path, monkeypatch):
    """--vram_budget with --batch_size: XL's sizes are part of what its U-Net is told."""
    monkeypatch.setattr("library.memory.budget.RESERVED_BYTES", 0)
    monkeypatch.setattr("library.memory.budget.RESERVED_SHARE", 0.0)
    one, four = (run(few_blocks_sdxl, tmp_path, "--prompt", "a cat", "--batch_size", count) for count in ("1", "4"))
    alone, together = (phases_of(script, script.file_prompts[0]) for script in (one, four))
    assert [phase.works for phase in alone] == [("text_encoder",), ("text_encoder_2",), ("unet",), ("autoencoder",)]
    assert together[0].bytes == alone[0].bytes
    assert all(3 < large.bytes / small.bytes <= 4 for large, small in zip(together[2:], alone[2:]))
    with pytest.raises(UserError, match="does not fit into"):
        run(few_blocks_sdxl, tmp_path, "--prompt", "a cat", "--vram_budget", "0.0001")


def test_streamed_blocks_and_offloaded_parts_change_no_bit(few_blocks_sdxl, tmp_path):
    """--blocks_to_swap and --offload."""
    images = []
    for name, options in (("plain", []), ("streamed", ["--blocks_to_swap", "6"]), ("offloaded", ["--offload"])):
        run(few_blocks_sdxl, tmp_path / name, "--prompt", "a cat --d 1", *options).run()
        images += drawn(tmp_path / name)
    assert len(images) == 3 and len(set(images)) == 1
    with Image.open(next((tmp_path / "plain").glob("*.png"))) as image:
        assert image.size == (64, 64) and torch.tensor(list(image.tobytes())).float().std() > 1
