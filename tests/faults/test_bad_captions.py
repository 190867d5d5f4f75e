"""Captions of every kind: what cannot be read is named with its file, whatever can be read is trained."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from library.data.captions import CaptionRules, fixed_caption, make_caption, read_caption
from library.errors import UserError
from library.randomness import python_random
from tests.families.families import TINY
from tests.faults.corpus import broken_captions, encoded, odd_captions
from tests.running import no_weights_are_read, run_in_process

SECONDS = 2.0
VARIED = CaptionRules(
    caption_prefix="a, b",
    caption_suffix="\x1b[0m",
    caption_dropout_rate=0.1,
    enable_wildcard=True,
    shuffle_caption=True,
    keep_tokens=2,
    keep_tokens_separator="|||",
    token_warmup_min=0,
    token_warmup_step=0.5,
    caption_tag_dropout_rate=0.3,
    secondary_separator=";;",
)


@pytest.mark.parametrize("kind", broken_captions())
def test_a_caption_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_bytes(broken_captions()[kind])
    for wildcards in (False, True):
        with pytest.raises(UserError) as error:
            read_caption(path, enable_wildcard=wildcards)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert ("UTF-16" in str(error.value)) == (kind.startswith("UTF-16") or "zero bytes" in kind or kind == "UTF-32")


@pytest.mark.parametrize("kind", odd_captions())
def test_a_caption_that_can_be_read_becomes_a_prompt(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_bytes(odd_captions()[kind])
    started = time.monotonic()
    caption = read_caption(path, enable_wildcard=False).caption
    assert "\n" not in caption and "\r" not in caption
    assert fixed_caption(caption, CaptionRules()) == caption
    lines = read_caption(path, enable_wildcard=True).caption
    for epoch in range(1, 4):
        rng = python_random(epoch, "caption")
        prompt = make_caption(lines, VARIED, rng=rng, epoch=epoch, step=epoch, max_train_steps=4)
        assert "\n" not in prompt
    assert time.monotonic() - started < SECONDS


@pytest.fixture
def images(tmp_path):
    """A folder with an image for each kind of caption."""

    def make(captions: dict[str, bytes]):
        folder = tmp_path / "images"
        folder.mkdir()
        for name, data in captions.items():
            (folder / f"{name}.png").write_bytes(encoded("PNG", size=(64, 64)))
            (folder / f"{name}.txt").write_bytes(data)
        return folder

    return make


@pytest.mark.parametrize("model", TINY)
def test_training_names_every_caption_that_cannot_be_read(request, images, dataset_toml, tmp_path, model):
    files = request.getfixturevalue(f"{'few_blocks' if model.startswith('sd') else 'tiny'}_{model}")
    folder = images(broken_captions())
    os.mkfifo(folder / "pipe.txt")
    shutil.copy(folder / "empty.png", folder / "pipe.png")
    dataset = dataset_toml(folder, resolution=64, bucket_reso_steps=64)
    given = [*TINY[model].command(files), "--dataset_config", dataset, "--output_dir", tmp_path / "out"]
    with no_weights_are_read():
        result = run_in_process(TINY[model].script, *given)
    _, _, said = result.stderr.partition("error: ")
    assert result.returncode == 2 and len(said.splitlines()) == len(broken_captions()) + 1, result.stderr
    for name in (*broken_captions(), "pipe"):
        assert f"{folder / name}.txt: " in said


@pytest.mark.parametrize("model", [pytest.param("flux", marks=pytest.mark.thorough), "sd1"])
def test_whatever_can_be_read_is_encoded_and_trained(request, images, dataset_toml, tmp_path, model):
    folder = images(odd_captions())
    dataset = dataset_toml(folder, resolution=64, bucket_reso_steps=64, batch_size=20)
    given = [*request.getfixturevalue(f"{model}_command"), "--dataset_config", dataset, "--max_train_steps", 1]
    given += [
        "--output_dir",
        tmp_path / "out",
        "--cache_latents",
        "--weighted_captions" if model == "sd1" else "--lowram",
    ]
    started = time.monotonic()
    result = run_in_process(TINY[model].script, *given)
    assert result.returncode == 0, result.stderr[-3000:]
    assert time.monotonic() - started < 20 * SECONDS
    assert "1 caption file holds nothing but separators (only separators.txt)" in result.stderr
    assert "2 caption files have a blank first line (only a line end.txt, only blanks.txt)" in result.stderr
