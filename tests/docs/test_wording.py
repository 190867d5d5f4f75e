"""Phrases that native readers stumbled over stay out of messages, help, comments and guides."""

from __future__ import annotations

import re

from tests.docs.pages import PAGES
from tests.running import ROOT

INSTEAD = {
    "number format": "dtype",
    "not in memory now": "unloaded",
    "exclude each other": "are mutually exclusive",
    "drawn anew": "repainted",
    "(made|begins) anew": "rebuilt, starts over",
    "(is|are) told from": "is inferred from",
    "(is|are|was|were) asked for": "if requested",
    "as far as requested": "if requested",
    r"is no (colour|regular|finite|path|table|valid)\b": "is not a ...",
    r"so many (blocks|images|steps|batches)\b": "this many ...",
}
"""Each phrase, as a regular expression, and what to write."""


def test_phrases_that_readers_stumble_over_stay_out():
    sources = [*ROOT.glob("*.py"), *(path for room in ("library", "networks") for path in (ROOT / room).rglob("*.py"))]
    assert len(sources) > 300
    found = []
    for path in [*sources, *PAGES]:
        text = path.read_text(encoding="utf-8")
        for phrase, better in INSTEAD.items():
            found += [f"{path.relative_to(ROOT)}: {match[0]} -> {better}" for match in re.finditer(phrase, text)]
    assert found == []
