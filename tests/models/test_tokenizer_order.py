"""Tokenizers come from the user's folders first, then the checkpoint, then this program, and last from the hub."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from library.checkpoints import Checkpoint, open_checkpoint
from library.errors import UserError
from library.models.clip_tokenizer import ClipTokenizer
from library.models.tokenizer_files import CLIP_BIG_G, CLIP_H, CLIP_L, T5_XXL, load_tokenizer
from library.safetensors_io import save_file
from tools.make_tiny_models import write_clip_tokenizer, write_t5_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    sizes = write_clip_tokenizer(folder / "clip"), write_t5_tokenizer(folder / "t5")
    return folder, sizes


@pytest.fixture
def place(tmp_path):
    """A checkpoint in a folder of its own."""
    (tmp_path / "models").mkdir()
    save_file({"any": torch.ones(1)}, tmp_path / "models" / "clip_l.safetensors")
    return tmp_path


def checkpoint(place) -> Checkpoint:
    return open_checkpoint(place / "models" / "clip_l.safetensors", option="--clip_l")


def put_clip(folder, marker: str) -> None:
    """A tokenizer that is told from others by the id of its letter a."""
    write_clip_tokenizer(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["a</w>"], vocabulary[f"{marker}</w>"] = vocabulary[f"{marker}</w>"], vocabulary["a</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")


def letter(tokenizer) -> int:
    return tokenizer("a").input_ids[1]


def test_the_order_of_places(place, tokenizers):
    vocabulary = tokenizers[1][0]
    found = []
    # from the last place to the first: each one that is added wins
    for marker, folder in (("x", "models"), ("y", "models/tokenizer"), ("z", "cache/openai_clip-vit-large-patch14")):
        put_clip(place / folder, marker)
        found.append(letter(load_tokenizer(CLIP_L, checkpoint(place), vocabulary, place / "cache")))
    assert len(set(found)) == 3
    without_cache = letter(load_tokenizer(CLIP_L, checkpoint(place), vocabulary, None))
    assert without_cache == found[1]


def test_the_shipped_clip_vocabulary_gives_the_known_ids(place):
    tokenizer = load_tokenizer(CLIP_L, checkpoint(place), 49408)
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo of\na CAT").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer(["hello world", "x " * 100], max_length=77, padding="max_length", truncation=True).input_ids
    assert padded[0][:4] == [49406, 3306, 1002, 49407] and set(padded[0][3:]) == {49407}
    assert len(padded[1]) == 77 and padded[1][-1] == 49407


def test_tokenizers_of_other_kinds_in_the_same_folder_are_passed_over(place, tokenizers):
    folder, (_, t5_size) = tokenizers
    put_clip(place / "models", "x")
    shutil.copy(folder / "t5" / "spiece.model", place / "models" / "spiece.model")
    t5 = load_tokenizer(T5_XXL, checkpoint(place), t5_size)
    clip = load_tokenizer(CLIP_L, checkpoint(place), 514)
    assert type(t5).__name__ == "T5Tokenizer" and isinstance(clip, ClipTokenizer)
    t5.save_pretrained(place / "models" / "tokenizer_2")
    assert (place / "models" / "tokenizer_2" / "tokenizer.json").is_file()
    shutil.copy(place / "models" / "tokenizer_2" / "tokenizer.json", place / "models" / "tokenizer.json")
    assert len(load_tokenizer(CLIP_L, checkpoint(place), 49408)) == 49408, "a Unigram tokenizer.json isn't CLIP's"
    again = load_tokenizer(T5_XXL, checkpoint(place), t5_size)
    assert again("a red cat").input_ids == t5("a red cat").input_ids


def test_diffusers_folders_are_searched_from_the_model_and_from_the_encoder(tmp_path, tokenizers):
    folder, (_, size) = tokenizers
    shutil.copytree(folder / "t5", tmp_path / "tokenizer_2")
    (tmp_path / "text_encoder_2").mkdir()
    save_file({"any": torch.ones(1)}, tmp_path / "text_encoder_2" / "model.safetensors")
    for path in (tmp_path, tmp_path / "text_encoder_2", tmp_path / "text_encoder_2" / "model.safetensors"):
        tokenizer = load_tokenizer(T5_XXL, open_checkpoint(path, "text_encoder_2"), size)
        assert len(tokenizer) == size


def test_a_sentencepiece_model_inside_the_checkpoint_is_used(tmp_path, tokenizers):
    folder, (_, size) = tokenizers
    model = torch.tensor(list((folder / "t5" / "spiece.model").read_bytes()), dtype=torch.uint8)
    save_file({"any": torch.ones(1), "spiece_model": model}, tmp_path / "t5xxl.safetensors")
    tokenizer = load_tokenizer(T5_XXL, open_checkpoint(tmp_path / "t5xxl.safetensors"), size)
    ids = tokenizer("a cat", max_length=8, padding="max_length").input_ids
    assert len(ids) == 8 and ids[-1] == tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1 in ids


def test_sentinels_are_added_where_the_embedding_has_room(tmp_path, tokenizers):
    """T5's real vocabulary has 100 of them after its pieces; a small one may have none."""
    folder, (_, size) = tokenizers
    shutil.copy(folder / "t5" / "spiece.model", tmp_path / "spiece.model")
    save_file({"any": torch.ones(1)}, tmp_path / "t5xxl.safetensors")
    opened = open_checkpoint(tmp_path / "t5xxl.safetensors")
    small, large = (load_tokenizer(T5_XXL, opened, rows) for rows in (size, size + 128))
    assert (len(small), len(large)) == (size, size + 100)
    assert small("big green dog").input_ids == large("big green dog").input_ids


def test_a_vocabulary_larger_than_the_embedding_is_refused_by_name(place):
    with pytest.raises(UserError, match=r"49,408 entries, but --clip_l: .*clip_l\.safetensors.*only 512"):
        load_tokenizer(CLIP_L, checkpoint(place), 512)


def test_without_a_tokenizer_and_offline_the_message_says_what_to_give(place):
    with pytest.raises(UserError) as error:
        load_tokenizer(T5_XXL, checkpoint(place), 32128)
    message = str(error.value)
    assert "google_t5-v1_1-xxl" in message and "--tokenizer_cache_dir" in message and "spiece.model" in message


def test_what_the_hub_gives_is_used_and_saved(place, tokenizers, monkeypatch, caplog):
    folder, (_, size) = tokenizers
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder / "t5"))
    with caplog.at_level("INFO"):
        tokenizer = load_tokenizer(T5_XXL, checkpoint(place), size, place / "cache")
    assert "Hugging Face hub" in caplog.text and "google/t5-v1_1-xxl" in caplog.text
    monkeypatch.undo()
    again = load_tokenizer(T5_XXL, checkpoint(place), size, place / "cache")
    assert again("a big dog").input_ids == tokenizer("a big dog").input_ids and len(again) == size


def test_asking_the_hub_is_announced(place, caplog):
    with caplog.at_level("INFO"), pytest.raises(UserError):
        load_tokenizer(T5_XXL, checkpoint(place), 32128)
    assert "Hugging Face hub" in caplog.text and "google/t5-v1_1-xxl" in caplog.text


def test_a_cache_folder_without_a_tokenizer_is_named(place):
    (place / "cache" / "google_t5-v1_1-xxl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--tokenizer_cache_dir: .*google_t5-v1_1-xxl holds no spiece\.model"):
        load_tokenizer(T5_XXL, checkpoint(place), 32128, place / "cache")


@pytest.mark.parametrize("content", [b"nonsense", b"{}"])
def test_a_damaged_tokenizer_is_named(place, content):
    (place / "models" / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(T5_XXL, checkpoint(place), 32128)
    (place / "models" / "tokenizer.json").unlink()
    (place / "models" / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="models cannot be read"):
        load_tokenizer(T5_XXL, checkpoint(place), 32128)


# Padding: what Stable Diffusion's text encoders were trained to see, whatever a folder says

FOLDERS = {
    "stable-diffusion-2": ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}),
    "stable-diffusion-xl": (
        {"pad_token": "!", "added_tokens_decoder": {"0": {"content": "!", "special": True, "normalized": False}}},
        {"pad_token": "!"},
    ),
    "laion": ({"pad_token": "<|endoftext|>"}, {"pad_token": "<|endoftext|>"}),
    "bare": (None, None),
}


def put_clip_as(folder, name: str) -> None:
    """A tokenizer folder with the contradictory words about padding that real ones have."""
    write_clip_tokenizer(folder)
    config, special = FOLDERS[name]
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if special is not None:
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", **special}
        (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("kind, pad", [(CLIP_L, 513), (CLIP_H, 0), (CLIP_BIG_G, 0)])
def test_padding_is_the_text_encoders_and_never_cuts_a_text(place, kind, pad, name):
    put_clip_as(place / "cache" / kind.folder_name, name)
    tokenizer = load_tokenizer(kind, checkpoint(place), 514, place / "cache")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (512, 513, pad)
    vocabulary = tokenizer.get_vocab()
    text = [vocabulary[entry] for entry in ("h", "i</w>", "!", "!</w>", "a</w>", "!", "?</w>")]
    assert tokenizer("Hi!! a !?", add_special_tokens=False).input_ids == text
    assert tokenizer("<|endoftext|> a").input_ids == [512, 513, vocabulary["a</w>"], 513]


def test_a_tokenizer_json_that_pads_with_a_word_does_not_cut_texts_either(place):
    from transformers import CLIPTokenizer

    put_clip_as(place / "slow", "stable-diffusion-xl")
    folder = place / "cache" / CLIP_BIG_G.folder_name
    CLIPTokenizer.from_pretrained(place / "slow").save_pretrained(folder)
    assert not (folder / "merges.txt").exists()
    tokenizer = load_tokenizer(CLIP_BIG_G, checkpoint(place), 514, place / "cache")
    assert tokenizer("a!!", add_special_tokens=False).input_ids == [
        tokenizer.get_vocab()[entry] for entry in ("a</w>", "!", "!</w>")
    ]
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    "kind, folder",
    [(CLIP_H, "stabilityai_stable-diffusion-2"), (CLIP_BIG_G, "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")],
)
def test_each_stable_diffusion_tokenizer_has_its_own_cache_folder(place, kind, folder):
    put_clip(place / "cache" / folder, "x")
    put_clip(place / "cache" / CLIP_L.folder_name, "y")
    found = load_tokenizer(kind, checkpoint(place), 514, place / "cache")
    put_clip(place / "other", "x")
    assert letter(found) == json.loads((place / "other" / "vocab.json").read_text(encoding="utf-8"))["a</w>"]


def test_sdxls_second_tokenizer_is_found_beside_the_model_in_a_folder_of_its_own(place):
    put_clip(place / "models" / "tokenizer", "x")
    put_clip(place / "models" / "tokenizer_2", "y")
    first, second = (load_tokenizer(kind, checkpoint(place), 514) for kind in (CLIP_L, CLIP_BIG_G))
    assert letter(first) != letter(second)


@pytest.mark.parametrize("kind", [CLIP_H, CLIP_BIG_G])
def test_the_shipped_vocabulary_serves_every_clip_and_nothing_is_fetched(place, kind, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    tokenizer = load_tokenizer(kind, checkpoint(place), 49408, place / "no such folder")
    assert tokenizer("a photo!").input_ids == [49406, 320, 1125, 256, 49407]
    assert tokenizer.pad_token_id == 0
