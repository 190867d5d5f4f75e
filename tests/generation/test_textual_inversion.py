"""--textual_inversion_embeddings: the name of a file stands for its vectors, in every format that such files have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.generation.model_options import ModelOptions, open_model
from library.generation.text_options import TextOptions
from library.generation.textual_inversion import add_textual_inversions
from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
from library.safetensors_io import save_file
from tests.hostile_files import hostile_headers

CPU = torch.device("cpu")


def opened(model: Path, *embeddings: Path) -> StableDiffusionPipeline:
    pipeline = open_model(ModelOptions(ckpt=str(model)), TextOptions(), CPU)
    add_textual_inversions([str(path) for path in embeddings], pipeline)
    return pipeline


def encoded(pipeline: StableDiffusionPipeline, text: str) -> dict[str, Tensor]:
    return pipeline.encode_image_texts([text], chunks=1)[0]


def width(pipeline: StableDiffusionPipeline, encoder: str = "text_encoder") -> int:
    return pipeline.opened(encoder).hidden_size


def vectors(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sizes(few_blocks_sd1, few_blocks_sdxl) -> dict[str, int]:
    plain, xl = opened(few_blocks_sd1), opened(few_blocks_sdxl)
    return {"sd1": width(plain), "clip_l": width(xl), "clip_g": width(xl, "text_encoder_2")}


def reference_states(
    pipeline: StableDiffusionPipeline, encoder: str, before: str, added: Tensor, after: str
) -> tuple[Tensor, Tensor]:
    """All states and the last of a text with ``added`` vectors in it, by an encoder whose embedding is enlarged."""
    tokenizer = pipeline.tokenizer(encoder)
    module = copy.deepcopy(pipeline.load_text_encoders([encoder])[0].text_model)
    embedding = module.embeddings.token_embedding
    embedding.__dict__.pop("forward", None)
    rows = torch.cat((embedding.weight, added))
    ids = [
        tokenizer.bos_token_id,
        *tokenizer(before, add_special_tokens=False).input_ids,
        *range(len(embedding.weight), len(rows)),
        *tokenizer(after, add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    module.embeddings.token_embedding = nn.Embedding.from_pretrained(rows)
    ids += [tokenizer.pad_token_id] * (77 - len(ids))
    out = module(torch.tensor([ids]))
    return torch.stack(out.hidden_states), out.last_hidden_state


def test_a_name_stands_for_all_vectors_of_its_file(few_blocks_sd1, sizes, tmp_path):
    path, added = tmp_path / "good-embed.safetensors", vectors(3, sizes["sd1"])
    save_file({"emb_params": added}, path)
    pipeline = opened(few_blocks_sd1, path)
    own = pipeline.load_text_encoders()[0].text_model.embeddings.token_embedding.weight
    plain = opened(few_blocks_sd1).load_text_encoders()[0].text_model.embeddings.token_embedding.weight
    assert torch.equal(own, plain), "the model's own weights stay as they are in its file"
    _, last = reference_states(pipeline, "text_encoder", "a cat,", added, "and more")
    torch.testing.assert_close(encoded(pipeline, "a cat, good-embed and more")["hidden_state"], last)


def test_brackets_weigh_every_vector_of_a_name(few_blocks_sd1, sizes, tmp_path):
    path = tmp_path / "goodembed.safetensors"
    save_file({"emb_params": vectors(3, sizes["sd1"])}, path)
    pipeline = open_model(ModelOptions(ckpt=str(few_blocks_sd1)), TextOptions(emb_normalize_mode="none"), CPU)
    add_textual_inversions([str(path)], pipeline)
    plain, weighted = (encoded(pipeline, text)["hidden_state"] for text in ("x goodembed y", "x (goodembed:1.5) y"))
    factors = torch.ones(77, 1)
    factors[2:5] = 1.5
    torch.testing.assert_close(weighted, plain * factors)


@pytest.mark.parametrize("text", ["goodEmbed cat", "goodembeds", "mygoodembed", "goodembed1", "good embed"])
def test_a_name_is_found_only_as_a_word_in_its_own_letters(few_blocks_sd1, sizes, tmp_path, text):
    path = tmp_path / "goodembed.safetensors"
    save_file({"emb_params": vectors(2, sizes["sd1"])}, path)
    with_file, without = opened(few_blocks_sd1, path), opened(few_blocks_sd1)
    assert torch.equal(encoded(with_file, text)["hidden_state"], encoded(without, text)["hidden_state"])


def test_the_longest_of_several_names_is_found(few_blocks_sd1, sizes, tmp_path):
    for seed, name in enumerate(("neg", "neg-hand")):
        save_file({"emb_params": vectors(1 + seed, sizes["sd1"], seed)}, tmp_path / f"{name}_.safetensors")
    pipeline = opened(few_blocks_sd1, tmp_path / "neg_.safetensors", tmp_path / "neg-hand_.safetensors")
    words, tokenizer = pipeline.words["text_encoder"], pipeline.tokenizer("text_encoder")
    first = words.vocabulary
    assert words.tokens(tokenizer, "neg-hand_, neg_")[:2] == [first + 1, first + 2]
    assert words.tokens(tokenizer, "neg-hand_, neg_")[-1] == first


def written(path: Path, content: Mapping[str, object]) -> Path:
    torch.save(dict(content), path)
    return path


@pytest.mark.parametrize("kind", ["trainer .pt", "web UI", "old web UI", "Diffusers", "Diffusers, one vector"])
def test_every_format_gives_the_same(few_blocks_sd1, sizes, tmp_path, kind):
    count = 1 if kind == "Diffusers, one vector" else 2
    added = vectors(count, sizes["sd1"])
    contents: dict[str, tuple[str, dict[str, object]]] = {
        "trainer .pt": ("pt", {"emb_params": added}),
        "web UI": ("pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": added}, "name": "a", "step": 5}),
        "old web UI": ("pt", {"string_to_param": nn.ParameterDict({"*": nn.Parameter(added)}), "name": "a"}),
        "Diffusers": ("bin", {"<cat-toy>": added}),
        "Diffusers, one vector": ("bin", {"<cat-toy>": added[0]}),
    }
    suffix, content = contents[kind]
    pipeline = opened(few_blocks_sd1, written(tmp_path / f"goodembed.{suffix}", content))
    _, last = reference_states(pipeline, "text_encoder", "", added, "")
    torch.testing.assert_close(encoded(pipeline, "goodembed")["hidden_state"], last)


def test_xl_has_vectors_for_both_encoders_and_pools_at_the_end_of_the_text(few_blocks_sdxl, sizes, tmp_path):
    path = tmp_path / "goodembed.safetensors"
    added = {key: vectors(2, sizes[key]) for key in ("clip_l", "clip_g")}
    save_file(added, path)
    pipeline = opened(few_blocks_sdxl, path)
    ours = encoded(pipeline, "a goodembed cat")
    for number, (encoder, key) in enumerate((("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")), 1):
        states, last = reference_states(pipeline, encoder, "a", added[key], "cat")
        torch.testing.assert_close(ours[f"hidden_state{number}"], states[-2])
    end = 1 + 1 + 2 + len(pipeline.tokenizer("text_encoder_2")("cat", add_special_tokens=False).input_ids)
    projection = pipeline.load_text_encoders(["text_encoder_2"])[0].text_projection
    torch.testing.assert_close(ours["pool2"], projection(last[:, end]))


@pytest.mark.parametrize(("key", "ordinal"), [("clip_l", "second"), ("clip_g", "first")])
def test_an_xl_file_for_one_encoder_is_used_with_a_warning(few_blocks_sdxl, sizes, tmp_path, caplog, key, ordinal):
    path = tmp_path / "goodembed.safetensors"
    save_file({key: vectors(2, sizes[key])}, path)
    pipeline = opened(few_blocks_sdxl, path)
    assert f"the {ordinal} text encoder does not see its name" in caplog.text
    ours, without = encoded(pipeline, "a goodembed cat"), encoded(pipeline, "a  cat")
    same = {name: torch.equal(ours[name], without[name]) for name in ("hidden_state1", "hidden_state2")}
    assert same == {"hidden_state1": key == "clip_g", "hidden_state2": key == "clip_l"}


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_embedding_for_the_model_are_one_sentence(few_blocks_sd1, few_blocks_sdxl, sizes, tmp_path):
    good = vectors(2, sizes["sd1"])
    refused: list[tuple[Path, str, object, str]] = [
        (few_blocks_sd1, "wide.pt", {"emb_params": vectors(1, 7)}, "holds vectors of 7 values; the text encoder of th"),
        (few_blocks_sd1, "xl.pt", {"clip_l": good, "clip_g": good}, "is an embedding for Stable Diffusion XL"),
        (few_blocks_sdxl, "sd1.pt", {"emb_params": good}, "it holds neither clip_l nor clip_g"),
        (few_blocks_sd1, "several.pt", {"a": good, "b": good}, r"it holds 2 tensors \(a, b, ...\), not one"),
        (few_blocks_sd1, "nothing.pt", {"name": "x"}, "it holds no tensor"),
        (few_blocks_sd1, "odd.pt", {"a": torch.ones(1, 1, 1)}, '"a" is not a list of vectors'),
        (few_blocks_sd1, "list.pt", [good], "contains no set of named tensors"),
        (few_blocks_sd1, "harmful.pt", {"a": Harmful()}, "could run code"),
    ]
    for model, name, content, message in refused:
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"^--textual_inversion_embeddings: .*{name}.*{message}"):
            opened(model, tmp_path / name)
    for name, message in (("missing.pt", "does not exist"), ("image.png", "embeddings in images are not supported")):
        with pytest.raises(UserError, match=f"^--textual_inversion_embeddings: .*{name}.*{message}"):
            opened(few_blocks_sd1, tmp_path / name)


def test_a_name_that_is_taken_is_refused(few_blocks_sd1, sizes, tmp_path):
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "a.pt", tmp_path / "goodembed.pt", tmp_path / "other" / "goodembed.pt"):
        torch.save({"emb_params": vectors(1, sizes["sd1"])}, path)
    with pytest.raises(UserError, match='a.pt: "a" is in the vocabulary of the text encoder; rename the file'):
        opened(few_blocks_sd1, tmp_path / "a.pt")
    with pytest.raises(UserError, match='there is another embedding of the name "goodembed"; rename one'):
        opened(few_blocks_sd1, tmp_path / "goodembed.pt", tmp_path / "other" / "goodembed.pt")


def test_hostile_embedding_files_are_one_sentence(few_blocks_sd1, sizes, tmp_path):
    """Damaged safetensors files of every kind, and pickles that are cut short or hold other things than vectors."""
    pipeline = opened(few_blocks_sd1)
    save_file({"emb_params": vectors(2, sizes["sd1"])}, tmp_path / "sound.safetensors")
    files = {
        f"{name}.safetensors": data
        for name, data in hostile_headers((tmp_path / "sound.safetensors").read_bytes()).items()
    }
    torch.save({"emb_params": vectors(2, sizes["sd1"])}, tmp_path / "sound.pt")
    sound = (tmp_path / "sound.pt").read_bytes()
    files |= {f"cut{size}.pt": sound[:size] for size in (0, 1, 100, len(sound) // 2, len(sound) - 1)}
    for name, content in (
        ("sparse", {"a": torch.eye(3).to_sparse()}),
        ("meta", {"a": torch.empty(2, sizes["sd1"], device="meta")}),
        ("numbers", {"a": torch.ones(2, 3, dtype=torch.int64)}),
        ("nested", {"string_to_param": {"*": {"a": torch.ones(1, 3)}}}),
        ("text", {"string_to_param": "abc"}),
    ):
        torch.save(content, tmp_path / "written.pt")
        files[f"{name}.pt"] = (tmp_path / "written.pt").read_bytes()
    accepted = []
    for number, (name, data) in enumerate(files.items()):
        path = tmp_path / f"hostile{number}{Path(name).suffix}"
        path.write_bytes(data)
        try:
            add_textual_inversions([str(path)], pipeline)
        except UserError as error:
            assert str(error).startswith(f"--textual_inversion_embeddings: {path}"), (name, error)
            assert "\n" not in str(error), name
        else:
            accepted.append(name)
    assert accepted == ["overlap.safetensors"], "which a file of one tensor cannot have"
