"""Errors that are the user's to mend: one clear sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing fails with on a full disk, at a quota and at a limit on the size of files."""


class UserError(Exception):
    """A mistake in what the user gave: a command line, a file, a folder.

    ``str(error)`` is one sentence (or a short list) that says what is wrong, where (file, key, line), and what would be
    right. Entry scripts print it and end with its ``exit_code``.
    """

    exit_code = 2


class UnsavedError(UserError):
    """What a run made could not be written where it should be; its user did nothing wrong."""

    exit_code = 1


class NotFiniteError(UserError):
    """A part of a model gave NaN or infinity; its file may be damaged, which takes reading it to know."""


def in_one_line(error: BaseException) -> str:
    """What an error says, without line breaks; its kind stands before it unless it is a UserError."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text.removesuffix(".")
    return f"{type(error).__name__}: {text[:300]}".removesuffix(".").removesuffix(": ")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like ``name``, or else the only one with this word in it; None without one."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    matches = close or [other for other in names if name in other.split("_")]
    return matches[0] if len(matches) == 1 else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``' Did you mean "x"?'`` for the nearest known name, or an empty string."""
    match = nearest(name, known)
    return f' Did you mean "{match}"?' if match else ""
