"""The readers of Windows commands read known examples as the shells do."""

from __future__ import annotations

import subprocess

import pytest

from tests.docs.windows_shells import NotPlain, cmd_commands, powershell_commands


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # Microsoft's table of how a C program's arguments are parsed
        ('x "abc" d e', ["x", "abc", "d", "e"]),
        (r'x a\\b d"e f"g h', ["x", r"a\\b", "de fg", "h"]),
        (r"x a\\\"b c d", ["x", r"a\"b", "c", "d"]),
        (r'x a\\\\"b c" d e', ["x", r"a\\b c", "d", "e"]),
        ('x "" a', ["x", "", "a"]),
        # cmd's own
        ("x ^\n  --a=1 ^\n  --b 2", ["x", "--a=1", "--b", "2"]),
        ("x a^&b", ["x", "a&b"]),
        ('x "a^b" "<c>"', ["x", "a^b", "<c>"]),
        ("x 'a b'", ["x", "'a", "b'"]),
        ("x --warmup=5% y", ["x", "--warmup=5%", "y"]),
        (r".venv\Scripts\activate", [r".venv\Scripts\activate"]),
    ],
)
def test_cmd(text, words):
    assert cmd_commands(text) == [words]


@pytest.mark.parametrize(
    "words", [["a b", "c"], ['"', "\\", "\\\\"], ["a\\", 'b"c', "", "--x=y z"], ['a\\"b', "'c d'"]]
)
def test_cmd_words_are_those_that_python_writes_for_windows(words):
    """``subprocess.list2cmdline`` is the way back, written independently."""
    assert cmd_commands(subprocess.list2cmdline(["x", *words])) == [["x", *words]]


@pytest.mark.parametrize("text", ["x <path>", "x a & y", "x a > b", "x %PATH%", 'x "a', 'x "a\nb"'])
def test_what_cmd_would_not_hand_on_is_an_error(text):
    with pytest.raises(NotPlain):
        cmd_commands(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('x "a b" \'c "d\'', None),  # the quotation mark inside would be lost
        ('x --a="b c" d"e f"g', ["x", "--a=b c", "de fg"]),
        ("x 'a b' 'it''s'", ["x", "a b", "it's"]),
        ('x "a`tb" "<c>" "5%"', ["x", "a\tb", "<c>", "5%"]),
        ("x `\n  --a=1 `\n  --b 2", ["x", "--a=1", "--b", "2"]),
        ("x a` b", ["x", "a b"]),
        (r"x models\a --lr=1e-4 --n=-1.5 a#b", ["x", r"models\a", "--lr=1e-4", "--n=-1.5", "a#b"]),
    ],
)
def test_powershell(text, words):
    if words is None:
        with pytest.raises(NotPlain):
            powershell_commands(text)
    else:
        assert powershell_commands(text) == [words]


@pytest.mark.parametrize(
    "text",
    [
        *("x <path>", "x a;b", "x a,b", "x $a", 'x "$a"', "x {a}", "x (a)", "x @a", "x #a", '"x y" a', "x -a.b"),
        *('x "a', "x 'a\nb'", "x a & y", "x a > b"),
    ],
)
def test_what_powershell_would_not_hand_on_is_an_error(text):
    with pytest.raises(NotPlain):
        powershell_commands(text)


def test_several_commands():
    assert cmd_commands("a b\n\nc ^\nd\n") == [["a", "b"], ["c", "d"]]
    assert powershell_commands("a b\n\nc `\nd\n") == [["a", "b"], ["c", "d"]]
