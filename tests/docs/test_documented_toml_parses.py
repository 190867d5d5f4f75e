"""Every TOML and JSON file that the documentation shows is one that the programs take."""

from __future__ import annotations

import json
import logging

import pytest
import tomli

from library.data.captions import CaptionRules
from library.data.config import resolve_config
from library.data.items import read_subset
from library.data.options import DatasetOptions
from library.data.settings import SubsetSettings
from library.generation.image_prompts import ImagePrompt
from library.generation.prompt_sources import ImagePromptOptions, ImagePrompts
from library.options import SCRIPT, declared_options, flattened_keys, read_config_file
from library.prompt_options import read_prompt_file
from tests.docs.pages import TRAINERS, blocks


def kind_of(table: dict) -> str:
    if {"datasets", "general"} & set(table):
        return "dataset"
    return "prompts" if "prompt" in table else "options"


def resolve(path):
    return resolve_config(DatasetOptions(dataset_config=str(path), masked_loss=True))


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml(block, tmp_path):
    path = tmp_path / "documented.toml"
    path.write_text(block.text, encoding="utf-8")
    kind = kind_of(tomli.loads(block.text))
    if kind == "dataset":
        assert all(dataset.subsets for dataset in resolve(path))
    elif kind == "prompts":
        assert all(prompt.prompt for prompt in read_prompt_file(path))
    else:
        given = flattened_keys(path)
        known = declared_options(TRAINERS[given.pop(SCRIPT, block.script)].options_class)
        assert set(read_config_file(path, known)) == set(given)  # none of them without effect


def test_all_three_kinds_are_shown():
    assert {kind_of(tomli.loads(block.text)) for block in blocks("toml")} == {"dataset", "prompts", "options"}


def test_a_wrong_key_in_a_block_would_be_seen(tmp_path):
    path = tmp_path / "documented.toml"
    path.write_text('[[datasets]]\nresolutoin = 512\n[[datasets.subsets]]\nimage_dir = "x"\n', encoding="utf-8")
    with pytest.raises(Exception, match='Did you mean "resolution"'):
        resolve(path)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json(block, tmp_path):
    from PIL import Image

    path = tmp_path / "documented.json"
    path.write_text(block.text, encoding="utf-8")
    content = json.loads(block.text)
    if kind_of(content) == "dataset":
        assert resolve(path)[0].subsets
        return
    for key in content:
        image = (tmp_path / key).with_suffix(".png")
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(image)
    subset = SubsetSettings("here", image_dir=str(tmp_path), metadata_file=str(path), captions=CaptionRules())
    assert len(read_subset(subset, "fine_tuning", [])) == len(content)


PROMPT_FILES = [block for block in blocks("text") if " --w " in block.text]
OF_GEN_IMG = [block for block in PROMPT_FILES if block.page.stem.startswith("gen_img")]


@pytest.mark.parametrize("block", OF_GEN_IMG, ids=str)
def test_prompt_lines_of_gen_img(block, tmp_path, caplog):
    path = tmp_path / "documented.txt"
    path.write_text(block.text, encoding="utf-8")
    images = ImagePrompts(ImagePromptOptions(from_file=str(path)), ImagePrompt())
    images.check()
    assert images.count == len([line for line in block.text.splitlines() if line[:1] not in ("", "#")]) > 1
    assert caplog.text == ""


@pytest.mark.parametrize("block", [block for block in PROMPT_FILES if block not in OF_GEN_IMG], ids=str)
def test_prompt_lines(block, tmp_path, caplog):
    path = tmp_path / "documented.txt"
    path.write_text(block.text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "library"):
        prompts = read_prompt_file(path)
    assert prompts and all(prompt.width and prompt.seed is not None for prompt in prompts)
    assert caplog.text == ""  # an option that is none would be warned about
