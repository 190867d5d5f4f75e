"""The tables of docs/config_README-en.md: every key where it may stand, with the default that it has."""

from __future__ import annotations

import json
import re

from library.data.captions import CaptionRules
from library.data.config import resolve_config
from library.data.config_file import DatasetTable, GeneralTable, SubsetKeys, SubsetTable
from library.data.options import DatasetOptions
from tests.running import ROOT

TEXT = (ROOT / "docs" / "config_README-en.md").read_text(encoding="utf-8")


def table(chapter: str) -> dict[str, str]:
    """Key and default of each row of a chapter's table."""
    text = TEXT.split(f"### {chapter}", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", text, flags=re.MULTILINE)
    return {key: default.strip() for key, default in rows}


def test_every_key_stands_in_the_table_of_its_place():
    subset_keys = set(SubsetKeys.model_fields)
    assert set(table("3.1.")) == set(GeneralTable.model_fields) - subset_keys
    assert set(table("3.2.")) == subset_keys
    assert set(table("3.3.")) == set(SubsetTable.model_fields) - subset_keys
    assert set(DatasetTable.model_fields) - set(GeneralTable.model_fields) == {"subsets"}


def test_defaults_are_those_that_a_file_without_the_keys_gets(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "x"\n', encoding="utf-8")
    dataset = resolve_config(DatasetOptions(dataset_config=str(path)))[0]
    subset = dataset.subsets[0]
    for key, shown in {**table("3.1."), **table("3.2."), **table("3.3.")}.items():
        if key in ("resolution", "image_dir"):
            continue
        holder = dataset if hasattr(dataset, key) else subset
        holder = subset.captions if key in CaptionRules.__dataclass_fields__ else holder
        value = getattr(holder, key)
        assert shown == ("unset" if value in (None, {}) else f"`{json.dumps(value)}`"), key
