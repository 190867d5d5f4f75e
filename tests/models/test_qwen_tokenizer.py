"""Qwen2.5's tokenizer is found under the names that it shares with CLIP's, with its special tokens at the end."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from library.checkpoints import Checkpoint, open_checkpoint
from library.errors import UserError
from library.models.hunyuan_image.text import qwen_tokens
from library.models.tokenizer_files import (
    CLIP_L,
    GEMMA_2,
    QWEN2_5_VL,
    QWEN_ADDED,
    QWEN_SPECIAL,
    T5_XXL,
    load_tokenizer,
)
from library.safetensors_io import save_file
from tools.make_tiny_models import gemma_tokenizer, tokenizer_entries, write_clip_tokenizer, write_t5_tokenizer
from tools.tiny_hunyuan_text import write_diffusers_qwen2_5_vl, write_qwen_tokenizer

CORPUS = [
    "",
    "a red cat",
    " two  spaces\n\nand\r\nlines",
    "don't it's WE'LL",
    "1234 1,5",
    "Größe, ﬁ, e\u0301, 日本語 😀",
    "<|im_start|>user\na cat<|im_end|>",
    "<tool_call>x</tool_call> <|endoftext|><|vision_pad|><think>",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with vocab.json and merges.txt, and the number of entries."""
    folder = tmp_path_factory.mktemp("qwen")
    return folder, write_qwen_tokenizer(folder)


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    """A folder with nothing but a tokenizer.json, made by the tokenizers library alone."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(files[0] / "vocab.json"), str(files[0] / "merges.txt")))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pieces = [
        pre_tokenizers.Split(Regex(f"{words}|{others}"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    for names, is_special in ((QWEN_SPECIAL, True), (QWEN_ADDED, False)):
        tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False) for name in names])
    folder = tmp_path_factory.mktemp("converted")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def checkpoint(folder) -> Checkpoint:
    folder.mkdir(exist_ok=True, parents=True)
    save_file({"any": torch.ones(1)}, folder / "qwen_2.5_vl_7b.safetensors")
    return open_checkpoint(folder / "qwen_2.5_vl_7b.safetensors", option="--text_encoder")


def copy(folder, place) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, place)


PLACES = {"cache": "cache/Qwen_Qwen2.5-VL-7B-Instruct", "beside": "models", "folder beside": "models/tokenizer"}


@pytest.mark.parametrize("form", ["files", "json"])
@pytest.mark.parametrize("place", PLACES)
def test_ids_are_those_of_the_tokenizers_library(tmp_path, files, converted, place, form):
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(converted / "tokenizer.json"))
    copy(converted if form == "json" else files[0], tmp_path / PLACES[place])
    settings = {"padding_side": "left", "truncation_side": "left", "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / PLACES[place] / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), files[1], tmp_path / "cache")
    assert tokenizer(CORPUS).input_ids == [reference.encode(text).ids for text in CORPUS]
    assert len(tokenizer) == files[1] and tokenizer.pad_token == "<|endoftext|>"
    tokens = qwen_tokens(tokenizer, ["a", "a red cat"])
    assert tokens.mask[0].tolist() == [1] * 36 + [0] * 2 and (tokens.ids[0, 36:] == tokenizer.pad_token_id).all()


def test_ids_are_those_of_transformers_from_a_diffusers_folder(tmp_path):
    write_diffusers_qwen2_5_vl(tmp_path)
    opened = open_checkpoint(tmp_path, "text_encoder")
    tokenizer = load_tokenizer(QWEN2_5_VL, opened, 1000)
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    reference = Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer(CORPUS).input_ids == reference(CORPUS).input_ids
    assert tokenizer.pad_token_id == reference.pad_token_id


def test_special_tokens_follow_the_vocabulary(tmp_path, files):
    """So they have the published numbers, from 151643, behind the published vocab.json of 151,643 entries."""
    copy(files[0], tmp_path / "models")
    tokenizer = load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), files[1])
    count = len(json.loads((files[0] / "vocab.json").read_text(encoding="utf-8")))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<tool_call>", "<|file_sep|>"]
    published = [151643, 151644, 151645, 151652, 151657, 151664]
    assert tokenizer.convert_tokens_to_ids(names) == [number - 151643 + count for number in published]


def test_the_order_of_places(tmp_path, files):
    opened, found = checkpoint(tmp_path / "models"), []
    for letter, place in zip("xyz", ("beside", "folder beside", "cache")):
        folder = tmp_path / PLACES[place]
        copy(files[0], folder)
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        vocabulary["w"], vocabulary[letter] = vocabulary[letter], vocabulary["w"]
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        found.append(load_tokenizer(QWEN2_5_VL, opened, files[1], tmp_path / "cache")("w").input_ids[0])
    assert len(set(found)) == 3


def test_each_text_encoder_finds_its_own_tokenizer_in_one_folder(tmp_path, files, converted):
    """Qwen's and CLIP's files have the same names; the other form, tokenizer.json, is one for all, too."""
    models = tmp_path / "models"
    opened = checkpoint(models)
    clip, t5 = write_clip_tokenizer(models), write_t5_tokenizer(models)
    copy(converted, models)
    assert len(load_tokenizer(QWEN2_5_VL, opened, files[1])) == files[1]
    (models / "tokenizer.json").unlink()
    assert len(load_tokenizer(CLIP_L, opened, clip)) == clip
    copy(files[0], models)
    (models / "tokenizer.model").write_bytes(gemma := gemma_tokenizer())
    assert len(load_tokenizer(CLIP_L, opened, 49408)) == 49408, "Qwen's files aren't CLIP's"
    assert len(load_tokenizer(QWEN2_5_VL, opened, files[1])) == files[1]
    assert len(load_tokenizer(T5_XXL, opened, t5)) == t5
    assert len(load_tokenizer(GEMMA_2, opened, 400)) == tokenizer_entries(gemma)


@pytest.mark.parametrize("content", ["nonsense", "[]"])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_damaged_file_is_named(tmp_path, files, converted, name, content):
    copy(files[0] if name == "vocab.json" else converted, tmp_path / "models")
    (tmp_path / "models" / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name} is not a valid tokenizer file\.$"):
        load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), files[1])


def test_damaged_merges_are_one_sentence(tmp_path, files):
    copy(files[0], tmp_path / "models")
    (tmp_path / "models" / "merges.txt").write_text("#version: 0.2\nnot a pair\n", encoding="utf-8")
    with pytest.raises(UserError, match="^The tokenizer in .*models cannot be read: ") as error:
        load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), files[1])
    assert "\n" not in str(error.value)


def test_a_vocabulary_larger_than_the_embedding_is_refused_by_name(tmp_path, files):
    copy(files[0], tmp_path / "models")
    message = rf"{files[1]} entries, but --text_encoder: .* only {files[1] - 1}.*named Qwen_Qwen2\.5-VL-7B-Instruct"
    with pytest.raises(UserError, match=message):
        load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), files[1] - 1)


def test_a_cache_folder_with_another_models_tokenizer_is_named(tmp_path):
    write_clip_tokenizer(tmp_path / PLACES["cache"])
    with pytest.raises(UserError, match=r"holds no vocab\.json \+ merges\.txt or tokenizer\.json of Qwen/Qwen2\.5-VL"):
        load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), 152064, tmp_path / "cache")


def test_without_a_tokenizer_and_offline_the_hub_is_announced_and_a_sentence_says_what_to_give(tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(UserError) as error:
        load_tokenizer(QWEN2_5_VL, checkpoint(tmp_path / "models"), 152064)
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in caplog.text and "Hugging Face hub" in caplog.text
    message = str(error.value)
    for part in ("Qwen_Qwen2.5-VL-7B-Instruct", "--tokenizer_cache_dir", "vocab.json and merges.txt"):
        assert part in message
    assert "\n" not in message


def test_what_the_hub_gives_is_used_and_saved(tmp_path, files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(files[0]))
    opened, cache = checkpoint(tmp_path / "models"), tmp_path / "cache"
    expected = load_tokenizer(QWEN2_5_VL, opened, files[1], cache)(CORPUS).input_ids
    monkeypatch.undo()
    assert load_tokenizer(QWEN2_5_VL, opened, files[1], cache)(CORPUS).input_ids == expected
