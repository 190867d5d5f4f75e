"""CLIP's tokenizer gives the ids of transformers' CLIPTokenizer, for the folders that models come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from library.models.clip_tokenizer import ClipTokenizer, clip_tokenizer
from library.models.tokenizer_files import BPE_FILES, _shipped_clip
from tools.tiny_parts import write_clip_tokenizer

FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
START, END = ({"content": f"<|{which}oftext|>", **FLAGS} for which in ("start", "end"))
NAMES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
DECODER = {"512": {**START, "special": True}, "513": {**END, "special": True}}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "names": ({**NAMES, "pad_token": "<|endoftext|>"}, {}),
    "stable-diffusion-v1-5": (
        {
            "bos_token": {"__type": "AddedToken", **START},
            "eos_token": {"__type": "AddedToken", **END},
            "unk_token": {"__type": "AddedToken", **END},
            "pad_token": "<|endoftext|>",
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "name_or_path": "openai/clip-vit-large-patch14",
            "tokenizer_class": "CLIPTokenizer",
        },
        {"bos_token": START, "eos_token": END, "pad_token": "<|endoftext|>", "unk_token": END},
    ),
    "stable-diffusion-2": (
        {"bos_token": {"__type": "AddedToken", **START}, "eos_token": {"__type": "AddedToken", **END}},
        {"bos_token": START, "eos_token": END, "pad_token": "!", "unk_token": END},
    ),
    "stable-diffusion-xl, second": (
        {**NAMES, "added_tokens_decoder": {"0": {**END, "content": "!", "special": True}, **DECODER}, "pad_token": "!"},
        {**NAMES, "pad_token": "!"},
    ),
    "FLUX.1": (
        {**NAMES, "added_tokens_decoder": DECODER, "pad_token": "<|endoftext|>", "additional_special_tokens": []},
        {"bos_token": START, "eos_token": {**END, "normalized": False}, "pad_token": "<|endoftext|>"},
    ),
}
TEXTS = [
    "",
    "a photo of a Cat, sitting   on\n the mat!!  It's 1999 -- isn't it?",
    "(masterpiece:1.2), [blurry] <lora:x:0.5>",
    "<|startoftext|> inside <|endoftext|> a text, and <|STARTOFTEXT|> <|EndOfText|>",
    "Größe ﬁne café cafe\u0301 \u00a0 日本語 😀👩‍👧 \u200b\x00",
    "word " * 90,
]


def write_folder(folder: Path, name: str) -> Path:
    write_clip_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    for file, content in zip(("tokenizer_config.json", "special_tokens_map.json"), FOLDERS[name], strict=True):
        if content:
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def assert_same(ours: ClipTokenizer, theirs: Any) -> None:
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        plain = {"add_special_tokens": False, "verbose": False}
        assert ours(text, **plain).input_ids == theirs(text, **plain).input_ids
    padded: dict[str, Any] = {"max_length": 77, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
    mine, other = ours(TEXTS, **padded), theirs(TEXTS, **padded)
    assert torch.equal(mine.input_ids, other.input_ids) and torch.equal(mine.attention_mask, other.attention_mask)


@pytest.mark.parametrize("name", [name for name in FOLDERS if "!" not in str(FOLDERS[name])])
def test_ids_are_the_same_for_the_folders_of_models(name, tmp_path):
    folder = write_folder(tmp_path, name)
    ours, theirs = clip_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours is not None
    mine, other = (json.loads(tokenizer.to_str()) for tokenizer in (ours.backend, theirs.backend_tokenizer))
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "model"):
        assert mine[part] == other[part], part
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", [name for name in FOLDERS if "!" in str(FOLDERS[name])])
def test_a_pad_token_of_one_character_is_no_special_token(name, tmp_path):
    """As a special token it would cut texts; everything else is as in transformers."""
    folder = write_folder(tmp_path, name)
    ours, theirs = clip_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours is not None
    added = json.loads(theirs.backend_tokenizer.to_str())["added_tokens"]
    assert json.loads(ours.backend.to_str())["added_tokens"] == [token for token in added if token["content"] != "!"]


def test_the_shipped_vocabulary_is_read_as_transformers_reads_it(tmp_path):
    ours = _shipped_clip()
    ours.backend.model.save(str(tmp_path))
    assert all((tmp_path / name).is_file() for name in BPE_FILES)
    assert_same(ours, CLIPTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("config", "other_file"),
    [
        ({"additional_special_tokens": ["<tag>"]}, None),
        ({"pad_token": "<pad>"}, None),
        ({"style_token": "<style>"}, None),
        ({"added_tokens_decoder": {**DECODER, "514": {**END, "content": "<tag>"}}}, None),
        ({"bos_token": None}, None),
        ({}, "added_tokens.json"),
        ({}, "tokenizer.json"),
    ],
)
def test_a_folder_that_asks_for_more_is_left_to_transformers(config, other_file, tmp_path):
    folder = write_folder(tmp_path, "nothing")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert other_file is not None or clip_tokenizer(folder) is None
    if other_file is not None:
        assert clip_tokenizer(folder) is not None
        (folder / other_file).write_text("{}", encoding="utf-8")
        assert clip_tokenizer(folder) is None
