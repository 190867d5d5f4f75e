"""Gemma's tokenizer gives sentencepiece's own ids behind the beginning of text, wherever its files come from."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import sentencepiece
import torch

from library.checkpoints import Checkpoint, open_checkpoint
from library.errors import UserError
from library.models.lumina.text import gemma_tokens
from library.models.tokenizer_files import CLIP_L, GEMMA_2, T5_XXL, load_tokenizer
from library.safetensors_io import save_file
from tools.make_tiny_models import gemma_tokenizer, tokenizer_entries, write_clip_tokenizer, write_t5_tokenizer

CORPUS = [
    "",
    "a red cat",
    " leading",
    "trailing ",
    " two  spaces   three    four ",
    "\nlines\n\nand\n\n\nmore\r\n",
    "tab\tand\u00a0other\u3000spaces",
    "日本語のテキスト、漢字",
    "Größe, straße, Ωμέγα, İstanbul, ﬁ ①",
    "العربية עברית हिन्दी",
    "😀 👨\u200d👩\u200d👧 emoji",
    "You are an assistant designed to draw. <Prompt Start> a cat",
    "<start_of_turn>user\na cat<end_of_turn>",
    "<table><td>12345.67</td>",
    "<0x41><mask>",
    "https://a.b/c?d=e&f=g",
    "a\u0000b",
    "a" * 300,
]
SPECIAL = ["<bos>", "a <bos> b", "<eos><pad>", "x<unk>y", " <bos> \n<pad>  a", "<BOS> < bos>"]


@pytest.fixture(scope="module")
def model() -> bytes:
    return gemma_tokenizer()


@pytest.fixture(scope="module")
def entries(model) -> int:
    return tokenizer_entries(model)


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    """A folder with nothing but the tokenizer.json that transformers makes of a sentencepiece model."""
    from transformers import GemmaTokenizer

    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer.model").write_bytes(model)
    GemmaTokenizer.from_pretrained(folder).save_pretrained(folder / "converted")
    assert not (folder / "converted" / "tokenizer.model").exists()
    return folder / "converted"


def checkpoint(folder, model: bytes | None = None, key: str = "spiece_model") -> Checkpoint:
    state = {"any": torch.ones(1)}
    if model is not None:
        state[key] = torch.tensor(list(model), dtype=torch.uint8)
    folder.mkdir(exist_ok=True, parents=True)
    save_file(state, folder / "gemma_2_2b.safetensors")
    return open_checkpoint(folder / "gemma_2_2b.safetensors", option="--gemma2")


def place_files(tmp_path, place: str, model: bytes, converted) -> tuple[Checkpoint, object]:
    """A checkpoint whose tokenizer is in one of the places that are looked at, and the cache folder."""
    cache, models = tmp_path / "cache", tmp_path / "models"
    if place.startswith("embedded"):
        return checkpoint(
            models, model, "text_encoders.spiece_model" if "all-in-one" in place else "spiece_model"
        ), None
    folder = {"cache": cache / "google_gemma-2-2b", "beside": models, "Diffusers": tmp_path / "tokenizer"}[
        place.split(",")[0]
    ]
    if "json" in place:
        shutil.copytree(converted, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(model)
    return checkpoint(tmp_path / "text_encoder" if place == "Diffusers" else models), cache


PLACES = ["embedded", "embedded, all-in-one", "cache", "cache, json", "beside", "beside, json", "Diffusers"]


@pytest.mark.parametrize("place", PLACES)
def test_ids_are_those_of_sentencepiece(tmp_path, place, model, entries, converted):
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    opened, cache = place_files(tmp_path, place, model, converted)
    tokenizer = load_tokenizer(GEMMA_2, opened, entries, cache)
    assert len(tokenizer) == entries
    # Its mark of a space, typed, is cut elsewhere by what transformers makes of a sentencepiece model
    texts = CORPUS if "json" in place else [*CORPUS, "\u2581a \u2581\u2581b"]
    assert tokenizer(texts).input_ids == [[own.bos_id(), *own.encode(text)] for text in texts]


@pytest.mark.parametrize("place", PLACES)
def test_special_tokens_in_a_text_are_what_transformers_makes_of_them(tmp_path, place, model, entries, converted):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(converted)
    assert type(reference).__name__ == "GemmaTokenizer"
    expected = [[2, *ids] for ids in reference(SPECIAL, add_special_tokens=False).input_ids]
    opened, cache = place_files(tmp_path, place, model, converted)
    assert load_tokenizer(GEMMA_2, opened, entries, cache)(SPECIAL).input_ids == expected
    assert expected[:3] == [[2, 2], [2, *reference.convert_tokens_to_ids(["a", "▁", "<bos>", "▁", "b"])], [2, 1, 0]]


@pytest.mark.parametrize("place", ["cache", "cache, json"])
def test_texts_begin_with_bos_and_are_padded_on_the_right_whatever_a_folder_says(
    tmp_path, place, model, entries, converted
):
    opened, cache = place_files(tmp_path, place, model, converted)
    settings = {"padding_side": "left", "truncation_side": "left", "add_bos_token": False, "add_eos_token": True}
    settings |= {"pad_token": "<eos>", "tokenizer_class": "GemmaTokenizer"}
    folder = cache / "google_gemma-2-2b"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokens = gemma_tokens(load_tokenizer(GEMMA_2, opened, entries, cache), ["a cat", "", "cat " * 20], 8)
    words = sentencepiece.SentencePieceProcessor(model_proto=model)
    short, long = words.encode("a cat"), words.encode("cat " * 20)
    assert len(short) < 7 < len(long)
    assert tokens["input_ids"].tolist() == [[2, *short, *[0] * (7 - len(short))], [2, *[0] * 7], [2, *long[:7]]]
    assert tokens["attention_mask"].sum(dim=1).tolist() == [1 + len(short), 1, 8]
    assert (tokens["attention_mask"].diff(dim=1) <= 0).all()
    assert tokens["input_ids"].dtype == tokens["attention_mask"].dtype == torch.int64


def test_the_order_of_places(tmp_path, entries):
    """From the last place to the first: each one that is added wins."""
    models = [gemma_tokenizer(words, entries) for words in ("ab ac ad", "be bf bg", "ch ci cj", "dk dl dm")]
    opened = checkpoint(tmp_path / "models", models[0])
    found = [load_tokenizer(GEMMA_2, opened, entries, tmp_path / "cache").get_vocab()]
    folders = ("models", "models/tokenizer", "cache/google_gemma-2-2b")
    for model, folder in zip(models[1:], folders):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "tokenizer.model").write_bytes(model)
        found.append(load_tokenizer(GEMMA_2, opened, entries, tmp_path / "cache").get_vocab())
    assert all(found[first] != found[second] for first in range(4) for second in range(first))


def test_files_of_other_models_under_the_same_names_are_passed_over(tmp_path, model, entries, converted):
    models = tmp_path / "models"
    opened = checkpoint(models, model)
    expected = load_tokenizer(GEMMA_2, opened, entries)("a cat").input_ids
    write_t5_tokenizer(models)
    (models / "spiece.model").rename(models / "tokenizer.model")
    write_clip_tokenizer(models)
    assert load_tokenizer(GEMMA_2, opened, entries)("a cat").input_ids == expected
    clip: Any = load_tokenizer(CLIP_L, opened, 514)
    clip.backend.save(str(models / "tokenizer.json"))
    assert (models / "tokenizer.json").is_file() and (models / "tokenizer_config.json").is_file()
    assert load_tokenizer(GEMMA_2, opened, entries)("a cat").input_ids == expected
    opened = checkpoint(models)
    shutil.copy(converted / "tokenizer.json", models / "tokenizer.json")
    assert load_tokenizer(GEMMA_2, opened, entries)("a cat").input_ids == expected
    (models / "vocab.json").unlink()
    assert len(load_tokenizer(CLIP_L, opened, 49408)) == 49408


def test_each_text_encoder_finds_its_own_tokenizer_in_one_folder(tmp_path, model, entries):
    models = tmp_path / "models"
    opened = checkpoint(models)
    (models / "tokenizer.model").write_bytes(model)
    vocabularies = {T5_XXL: write_t5_tokenizer(models), CLIP_L: write_clip_tokenizer(models), GEMMA_2: entries}
    found = {kind: load_tokenizer(kind, opened, size) for kind, size in vocabularies.items()}
    assert {kind: len(tokenizer) for kind, tokenizer in found.items()} == vocabularies
    starts = {kind: found[kind].get_vocab()[start] for kind, start in ((GEMMA_2, "<bos>"), (CLIP_L, "<|startoftext|>"))}
    assert starts == {kind: found[kind].bos_token_id for kind in starts}


def test_a_cache_folder_with_another_models_tokenizer_is_named(tmp_path, model, entries):
    opened, cache = checkpoint(tmp_path / "models", model), tmp_path / "cache"
    write_t5_tokenizer(cache / "google_gemma-2-2b")
    (cache / "google_gemma-2-2b" / "spiece.model").rename(cache / "google_gemma-2-2b" / "tokenizer.model")
    message = (
        r"^--tokenizer_cache_dir: .*google_gemma-2-2b holds no tokenizer\.model or tokenizer\.json of google/gemma"
    )
    with pytest.raises(UserError, match=message):
        load_tokenizer(GEMMA_2, opened, entries, cache)


def test_an_embedded_tokenizer_of_another_model_or_a_damaged_one_is_named(tmp_path, entries):
    write_t5_tokenizer(tmp_path / "t5")
    opened = checkpoint(tmp_path / "models", (tmp_path / "t5" / "spiece.model").read_bytes())
    with pytest.raises(UserError, match=r"^--gemma2: .*the tokenizer in its tensor \"spiece_model\" is not Gemma's"):
        load_tokenizer(GEMMA_2, opened, entries)
    opened = checkpoint(tmp_path / "models", gemma_tokenizer()[:-50])
    with pytest.raises(UserError, match=r"^--gemma2: .*the tokenizer in its tensor \"spiece_model\" cannot be read"):
        load_tokenizer(GEMMA_2, opened, entries)


def test_a_damaged_file_is_named(tmp_path, model, entries):
    opened = checkpoint(tmp_path / "models")
    (tmp_path / "models" / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(UserError, match=r"^The tokenizer in .*models cannot be read") as error:
        load_tokenizer(GEMMA_2, opened, entries)
    assert "\n" not in str(error.value)


def test_a_vocabulary_larger_than_the_embedding_is_refused_by_name(tmp_path, model, entries):
    opened = checkpoint(tmp_path / "models", model)
    with pytest.raises(UserError, match=rf"has {entries} entries, but --gemma2: .* for only {entries - 1}; put"):
        load_tokenizer(GEMMA_2, opened, entries - 1)
    assert len(load_tokenizer(GEMMA_2, opened, entries + 64)) == entries


def test_without_a_tokenizer_and_offline_the_hub_is_announced_and_a_sentence_says_what_to_give(tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(UserError) as error:
        load_tokenizer(GEMMA_2, checkpoint(tmp_path / "models"), 256000)
    assert "google/gemma-2-2b" in caplog.text and "Hugging Face hub" in caplog.text
    message = str(error.value)
    for part in ("google_gemma-2-2b", "--tokenizer_cache_dir", "tokenizer.model", "spiece_model"):
        assert part in message
    assert "\n" not in message


def test_what_the_hub_gives_is_used_and_saved(tmp_path, model, entries, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "tokenizer.model").write_bytes(model)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    opened, cache = checkpoint(tmp_path / "models"), tmp_path / "cache"
    expected = load_tokenizer(GEMMA_2, opened, entries, cache)(CORPUS).input_ids
    monkeypatch.undo()
    assert load_tokenizer(GEMMA_2, opened, entries, cache)(CORPUS).input_ids == expected
