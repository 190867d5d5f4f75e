"""What the users' guides promise, as lists: ``reference_data/flux_guide_walk.toml`` says how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli
from _pytest.mark.structures import ParameterSet

from tests.running import ROOT

LISTS = ROOT / "tests" / "reference_data"
Kind = Literal["command", "options", "toml", "dataset key", "prompt", "program", "elsewhere"]


@dataclass(frozen=True)
class Entry:
    """One thing that the guide says works. The list's head explains the fields."""

    id: str
    chapter: str
    kind: Kind
    text: str = ""
    beside: str = ""
    against: str | None = None
    without: tuple[str, ...] = ()
    model: str = ""
    """Kind of model; the family's own name unless it says another."""
    no_effect: tuple[str, ...] = ()
    shows: Mapping[str, Any] = field(default_factory=dict)
    names: str = ""
    """Options whose effect the entry shows; those of prompts begin with ``--``. (gen_img_guide_walk.toml)"""
    test: str = ""
    """The test that shows it, where it is not the walk's own."""
    thorough: bool = False
    """Whether it is run with --thorough only: another entry, or another family's, goes the same way."""


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(f"<{name}>", text)
        return value
    if isinstance(value, dict):
        return {_filled(key, names): _filled(part, names) for key, part in value.items()}
    return tuple(_filled(part, names) for part in value) if isinstance(value, list) else value


def _read(path: Path) -> list[Entry]:
    entries, family = [], {"model": path.name.partition("_")[0]}
    for table in tomli.loads(path.read_text(encoding="utf-8"))["entry"]:
        each, thorough = table.pop("each", None), table.pop("thorough", False)
        if each is None:
            entries.append(Entry(**{**family, **_filled(table, {}), "thorough": thorough}))
            continue
        assert thorough is True or set(thorough or ()) <= set(each), table["id"]
        patterns = each if isinstance(each, dict) else dict.fromkeys(each, "")
        for value, pattern in patterns.items():
            one = _filled(table, {"each": value, "pattern": pattern})
            one |= {"id": f"{one['id']}: {value}", "thorough": thorough is True or value in (thorough or ())}
            entries.append(Entry(**{**family, **one}))
    return entries


def cases(entries: Iterable[Entry]) -> list[ParameterSet]:
    """A case of a test for each entry, named after it."""
    marks = {True: [pytest.mark.thorough], False: []}
    return [pytest.param(entry, id=entry.id, marks=marks[entry.thorough]) for entry in entries]


WALKS = {path.name.partition("_")[0]: _read(path) for path in sorted(LISTS.glob("*_guide_walk.toml"))}
"""The lists by family."""
DATASETS = {entry.id: entry.text for entry in WALKS["flux"] if entry.kind == "toml"}
"""Dataset configurations of the guides by id."""
