"""The trigger word stands in every caption that is trained, for which ``[trigger]`` stands in prompts too."""

import json
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.cache import TextCache, TextFormat
from library.data.captions import CaptionRules, fixed_caption, make_caption
from library.data.contact_sheet import write_contact_sheet
from library.data.metadata import dataset_metadata
from library.data.options import DatasetOptions
from library.data.summary import summarize
from library.errors import UserError
from library.generation.lora_files import LoraFile, trigger_word
from library.prompt_options import PromptOptions, with_trigger
from library.safetensors_io import save_file
from library.training.output.sample_images import SampleOptions, Samples


def made(caption, *, seed=0, **rules):
    rules = CaptionRules(trigger_word="sks", **rules)
    return make_caption(caption, rules, rng=random.Random(seed), epoch=1, step=0, max_train_steps=100)


@pytest.mark.parametrize(
    ("caption", "prompt", "rules"),
    [
        ("a dog, park", "sks, a dog, park", {}),
        ("a sks dog", "a sks dog", {}),
        ("sks", "sks", {}),
        ("asks, sks2, Sks, sks_1", "sks, asks, sks2, Sks, sks_1", {}),
        ("(sks:1.2), dog", "(sks:1.2), dog", {}),
        ("a [trigger] dog and [trigger]", "a sks dog and sks", {}),
        ("", "sks", {}),
        ("dog", "a photo of sks dog", {"caption_prefix": "a photo of [trigger]"}),
        ("dog", "sks, photo of dog", {"caption_prefix": "photo of"}),
        ("a. b", "sks. a. b", {"caption_separator": "."}),
        ("a b", "sks a b", {"caption_separator": " "}),
        ("a;;;b", "sks, a,b", {"secondary_separator": ";;;"}),
        ("a, b ||| c", "sks, a, b ||| c", {"keep_tokens_separator": "|||"}),
        ("first\nsks", "sks, first", {}),
    ],
)
def test_the_word_is_put_before_captions_that_lack_it(caption, prompt, rules):
    assert made(caption, **rules) == prompt == fixed_caption(caption, CaptionRules(trigger_word="sks", **rules))


def test_the_tag_with_the_word_is_neither_moved_nor_dropped():
    kept = {made("a, b, sks dog, c", keep_tokens=1, caption_tag_dropout_rate=1.0, seed=s) for s in range(9)}
    assert kept == {"a, sks dog"}
    shuffled = {made("a, b, c", keep_tokens=1, shuffle_caption=True, seed=s) for s in range(30)}
    assert shuffled == {"sks, a, b, c", "sks, a, c, b"}  # keep_tokens counts the caption's own tags
    marked = {
        made("a ||| b, my sks, c ||| d", keep_tokens_separator="|||", shuffle_caption=True, seed=s) for s in range(30)
    }
    assert marked == {"a, my sks, b, c, d", "a, my sks, c, b, d"}
    assert made("a, b", token_warmup_step=50, caption_separator=",") == "sks, a"
    assert made("a; b", caption_separator=";", caption_tag_dropout_rate=1e-9) == "sks, a, b"
    assert made("sks, a", caption_dropout_rate=1.0) == ""


WORDS = st.lists(st.sampled_from(["sks", "asks", "dog", ", ", ",", " ", "[trigger]", "{sks|a}", "|||", "\n", "?"]))


@settings(max_examples=40)
@given(WORDS.map("".join), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
def test_every_prompt_has_the_word_once_it_is_not_dropped(caption, shuffle, wildcard, dropout, seed):
    rules = {"shuffle_caption": shuffle, "enable_wildcard": wildcard, "caption_tag_dropout_rate": dropout}
    prompt = made(caption, seed=seed, keep_tokens_separator="|||", keep_tokens=seed % 3, **rules)
    assert re.search(r"\bsks\b", prompt) and "[trigger]" not in prompt


@pytest.fixture
def captions(tmp_path, folder_of):
    return folder_of(tmp_path / "a", [(64, 64)] * 3, ["a dog, park", "my sks dog", "[trigger] barks"])


def trained(group):
    plans = group.plan(1, 1)
    return {
        caption for plan in plans for caption in group.load(plan, epoch=1, step=0, max_train_steps=9, seed=1).captions
    }


def test_regularisation_images_have_no_trigger_word_unless_their_own_table_gives_one(
    tmp_path, build, captions, folder_of
):
    plain = folder_of(tmp_path / "reg", [(64, 64)] * 2, ["a dog"] * 2)
    options = DatasetOptions(trigger_word="sks")
    toml = (
        f"resolution = 64\ncaption_extension = '.txt'\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{captions}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{plain}'\nis_reg = true\n"
    )
    group, _ = build([], toml=toml, options=options)
    assert trained(group) == {"sks, a dog, park", "my sks dog", "sks barks", "a dog"}
    assert 'a: 3 images x 1 repeats, trigger word "sks" put before 1 of 3 captions' in summarize(group)
    assert summarize(group).count("trigger word") == 1
    group, _ = build([], toml=toml + "trigger_word = 'zwx'\n", options=options)
    assert "zwx, a dog" in trained(group)
    group, _ = build([], toml=toml.replace("is_reg = true", "trigger_word = ''"), options=options)
    assert "a dog" in trained(group) and group.trigger_words == ["sks"]


def test_a_placeholder_for_no_word_is_noted(build, captions):
    group, _ = build(captions)
    assert "1 caption contains [trigger], but there is no trigger_word" in summarize(group)
    assert "[trigger] barks" in trained(group)


@pytest.mark.parametrize("word", ["a, b", "a\nb"])
def test_a_word_that_is_no_single_tag_is_refused_where_it_is_given(build, captions, word):
    toml = "resolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\n"
    reason = "must be one tag, without a line end or the caption separator"
    with pytest.raises(UserError, match=rf'number 1: trigger_word {reason} ","'):
        build([], toml=f"{toml}trigger_word = {json.dumps(word)}")
    with pytest.raises(UserError, match=f"^--trigger_word {reason}"):
        build([], toml=toml, options=DatasetOptions(trigger_word=word))


def test_a_changed_word_encodes_the_captions_that_it_changes_and_no_others(build, captions):
    asked = []

    def encode(texts):
        asked.append(sorted(texts))
        return {"x": torch.zeros(len(texts), 2)}

    for word in ("sks", "sks", "zwx"):
        group, _ = build(captions, subset={"trigger_word": word})
        TextCache(group, TextFormat("_te.npz", {"x": (2,)}), to_disk=True, identity="e").fill(encode, batch_size=9)
    assert asked == [
        ["my sks dog", "sks barks", "sks, a dog, park"],
        ["zwx barks", "zwx, a dog, park", "zwx, my sks dog"],
    ]


def test_files_and_the_contact_sheet_name_the_word(tmp_path, build, captions):
    group, _ = build(captions, subset={"trigger_word": "sks"})
    entries = dataset_metadata(group, DatasetOptions(dataset_config="x.toml"))
    assert entries["ss_trigger_word"] == "sks"
    assert json.loads(entries["ss_tag_frequency"]) == {
        "a": {"sks": 1, "a dog": 1, "park": 1, "my sks dog": 1, "sks barks": 1}
    }
    assert json.loads(entries["ss_datasets"])[0]["subsets"][0]["trigger_word"] == "sks"
    assert "ss_trigger_word" not in dataset_metadata(build(captions)[0], DatasetOptions(dataset_config="x.toml"))
    write_contact_sheet(group, tmp_path / "x.dataset.html", seed=1, max_train_steps=1)
    page = (tmp_path / "x.dataset.html").read_text(encoding="utf-8")
    assert '"caption": "sks, a dog, park"' in page.replace('":"', '": "') and "put before 1 of 3 captions" in page


def test_sample_prompts_name_the_word(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("[trigger] in a park --n no [trigger] --d 1\na cat\n", encoding="utf-8")

    def samples():
        return Samples(SampleOptions(sample_prompts=str(path), sample_at_first=True), None, None)

    for word, words in (("sks", ["zwx", "abc"]), (None, ["sks"])):
        drawn = samples()
        drawn.name_trigger(word, words)
        first = PromptOptions(prompt="sks in a park", negative_prompt="no sks", seed=1)
        assert drawn.prompts == [first, PromptOptions(prompt="a cat")]
    with pytest.raises(UserError, match=r"prompts.txt, prompt 1: \[trigger\] may stand for sks or zwx"):
        samples().name_trigger(None, ["sks", "zwx"])
    drawn = samples()
    drawn.name_trigger(None, [])
    assert drawn.prompts == samples().prompts


def test_a_lora_file_tells_its_trigger_word_to_prompts(tmp_path):
    told = [{"ss_trigger_word": "sks", "modelspec.trigger_phrase": "x"}, {"modelspec.trigger_phrase": "zwx man"}, {}]
    files = [LoraFile(tmp_path / f"{number}.safetensors", 1.0) for number in range(3)]
    for file, metadata in zip(files, told):
        save_file({"x": torch.zeros(1)}, file.path, metadata)
    assert trigger_word(files) == "sks, zwx man" and trigger_word(files[2:]) is None
    assert with_trigger(PromptOptions("a [trigger]"), trigger_word(files[:1])) == PromptOptions("a sks")
