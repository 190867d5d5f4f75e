"""Every promise of docs/reliability.md names tests, and each of these exists."""

from __future__ import annotations

import re

from tests.running import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_the_tests_that_are_named_exist():
    named = TEST.findall(PAGE)
    functions = {path: re.findall(r"^def (\w+)\(", (ROOT / path).read_text(), re.MULTILINE) for path, _ in named}
    assert [f"{path}::{name}" for path, name in named if name not in functions[path]] == []


def test_every_promise_names_a_test():
    tables = re.findall(r"^\| promise \| held by \|\n\|-+\|-+\|\n((?:\|.*\n)*)", PAGE, re.MULTILINE)
    assert len(tables) == PAGE.count("| promise |") == PAGE.count("| held by |") > 0
    promises = [line for table in tables for line in table.splitlines()]
    assert promises and [line for line in promises if not TEST.search(line.rpartition(" | ")[2])] == []
