"""Command lines to copy, quoted for the shells that people use."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

PLAIN = re.compile(r"[\w+=:./\\-]+", re.ASCII)
"""Words that neither cmd nor PowerShell reads otherwise."""


def for_posix(words: Sequence[str]) -> str:
    """For bash, zsh and the like."""
    return shlex.join(words)


def for_cmd(words: Sequence[str]) -> str:
    """For the Windows command prompt."""
    return " ".join(word if PLAIN.fullmatch(word) else _in_double_quotes(word) for word in words)


def _in_double_quotes(word: str) -> str:
    """As programs on Windows read their command line: a quote, and the backslashes before it, are escaped."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', word)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def for_powershell(words: Sequence[str]) -> str:
    """For PowerShell."""
    # A bare word that begins like -name. is cut in two at its dot.
    quoted = [w if PLAIN.fullmatch(w) and not re.match(r"-\w*\.", w) else _in_quotes(w) for w in words]
    return " ".join(["&", *quoted] if quoted[0].startswith("'") else quoted)


def _in_quotes(word: str) -> str:
    return "'" + word.replace("'", "''") + "'"


def in_every_shell(words: Sequence[str]) -> dict[str, str]:
    """The command by the shell's name."""
    return {"Linux, macOS": for_posix(words), "Windows, cmd": for_cmd(words), "PowerShell": for_powershell(words)}
