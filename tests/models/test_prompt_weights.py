"""Weighted prompts are read as kohya-ss/sd-scripts reads them; what it breaks on is text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.models.stable_diffusion.prompt_weights import parse_prompt_weights

OBSERVED = Path(__file__).parent.parent / "reference_data" / "prompt_weights.json"


@pytest.mark.parametrize("prompt, pieces", json.loads(OBSERVED.read_text(encoding="utf-8")).items())
def test_pieces_and_weights_are_those_observed(prompt, pieces):
    assert [list(piece) for piece in parse_prompt_weights(prompt)] == pieces


def rounded(prompt: str) -> list[tuple[str, float]]:
    return [(text, round(weight, 6)) for text, weight in parse_prompt_weights(prompt)]


def test_nested_brackets_multiply():
    expected = [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1)]
    assert rounded("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).") == [*expected, ("sky", 1.4641), (".", 1.1)]
    assert rounded("[[a] b]") == [("a", round(1 / 1.21, 6)), (" b", round(1 / 1.1, 6))]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (r"\(literal\] \\ c\d", [(r"(literal] \ cd", 1)]),
        ("a) b] x:1.5) y", [("a) b] x:1.5) y", 1)]),
        ("(a:-0.5) (b:+2) (c:.5) (d:3.)", [("a", -0.5), (" ", 1), ("b", 2), (" ", 1), ("c", 0.5), (" ", 1), ("d", 3)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("(a: 1.2)", [("a: 1.2", 1.1)]),
        ("()", [("", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", round(1 / 1.1, 6))]),
    ],
)
def test_escapes_and_odd_brackets(prompt, expected):
    assert rounded(prompt) == expected


@given(st.text(alphabet="ab ,:.12()[]\\", max_size=30))
def test_no_prompt_fails_and_no_letter_is_lost(prompt):
    pieces = parse_prompt_weights(prompt)
    assert all(text for text, _ in pieces) or pieces == [("", 1.0)]
    kept = "".join(text for text, _ in pieces)
    assert [letter for letter in kept if letter in "ab"] == [letter for letter in prompt if letter in "ab"]


@given(st.text(alphabet="ab :.1", max_size=30))
def test_a_prompt_without_brackets_is_one_piece(prompt):
    assert parse_prompt_weights(prompt) == [(prompt, 1.0)]
