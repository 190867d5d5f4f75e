"""Files that the disk may not take: of the others a run goes on without them, its last ones are written at any cost."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from library.console import warn

PAUSE = 10.0
"""Seconds until a failed writing is tried again."""


Write = Callable[[Path], None]
"""Writes a file or folder. Raises OSError when it fails, and leaves nothing then."""


def write_or_warn(write: Write, path: Path) -> str | None:
    """Let ``write`` write ``path``; returns None, or the message about the failure."""
    try:
        write(path)
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror or error})"
        warn(f"{problem}. The training continues until the next save.")
        return problem
    return None


def write_at_any_cost(write: Write, path: Path) -> str | None:
    """Let ``write`` write ``path``; returns None, or the message about where it is instead.

    It is tried twice, and then in new folders in the system's temporary folder, the user's own and the present one.
    """
    problem = _write_somewhere(write, path)
    if problem:
        warn(problem)
    return problem


def _write_somewhere(write: Write, path: Path) -> str | None:
    problem = ""
    for last in (False, True):
        try:
            write(path)
            return None
        except OSError as error:
            problem = f"{path} cannot be written ({error.strerror or error})"
        if not last:
            warn(f"{problem}; it is tried again in {PAUSE:g} s.")
            time.sleep(PAUSE)
    for folder in _other_folders():
        place: Path | None = None
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=folder)) / path.name
            write(place)
            return f"{problem}; it was saved as {place} instead."
        except OSError:
            if place is not None:
                shutil.rmtree(place.parent, ignore_errors=True)
    return f"{problem}, nor anywhere else; what was trained since the last saved file is lost."


def _other_folders() -> Iterator[Path]:
    for find in (lambda: Path(tempfile.gettempdir()), Path.home, Path.cwd):
        try:
            yield find()
        except (OSError, RuntimeError):  # there is none
            continue
