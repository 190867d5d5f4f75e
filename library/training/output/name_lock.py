"""One run at a time under one name: a file in the output folder says which process trains.

The file of a process that has died is taken over. A process of this machine is looked for; one of another machine,
which shares the folder, cannot be seen, so a running one touches its file again and again, and a newcomer waits for
that.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.console import say, warn
from library.errors import UserError
from library.files import SILENCE, held, write_once, write_text
from library.processes import ProcessMark, host_name, this_process

BEAT = 20.0
"""Seconds between the signs of life of a run."""
PATIENCE = 90.0
"""Seconds without a sign of life after which a run on another machine is taken for dead: some beats, and the minute for
which network file systems may remember a file's old time."""


class NameLock:
    """The right to write files of an ``--output_name`` into a folder, until ``release`` or the end of this process."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises UserError, naming the process, if another one has the right."""
        self.path = folder / f".{name}.running"
        self._released = threading.Event()
        self._text = json.dumps(
            {"process": str(this_process()), "host": host_name(), "since": time.time(), "id": uuid.uuid4().hex}
        )
        try:
            self._take()
        except OSError as error:
            warn(
                f"{self.path} cannot be written ({error.strerror}); another run of the same name would not be noticed."
            )
            return
        threading.Thread(target=self._beat, name="name-lock", daemon=True).start()

    def release(self) -> None:
        """Give the right back; a second time does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        with contextlib.suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self._text:
                self.path.unlink()

    def _take(self) -> None:
        while True:
            with contextlib.suppress(FileExistsError):
                return write_once(self.path, self._text.encode("utf-8"))
            try:
                text = self.path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                continue  # released in this moment
            if _mark(text) == this_process():  # an earlier run of this process
                return write_text(self.path, self._text)
            self._require_dead(text)
            if self._take_over(text):
                return

    def _require_dead(self, text: str) -> None:
        """Raises UserError if the process that has written ``text`` still runs."""
        mark = _mark(text)
        if mark is not None and mark.is_here:
            if mark.runs:
                raise UserError(self._refusal(text, f"process {mark.pid}"))
            return
        if self._is_touched():
            host = _entry(text).get("host", "another machine")
            raise UserError(self._refusal(text, f"process {mark.pid if mark else '?'} on {host}"))

    def _is_touched(self) -> bool:
        """Whether the file gets a new time while this waits."""
        try:
            before = self.path.stat().st_mtime
            if time.time() - before > SILENCE:
                return False
            say(f"{self.path} is of a run on another machine: waiting up to {PATIENCE:.0f} s for a sign of life")
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                time.sleep(min(1.0, PATIENCE / 10))
                if self.path.stat().st_mtime != before:
                    return True
        except FileNotFoundError:  # released in the meantime
            return False
        return False

    def _take_over(self, dead: str) -> bool:
        """Replace the text of a dead process; False where another newcomer was quicker."""
        with held(self.path) as is_there:
            if not is_there or self.path.read_text(encoding="utf-8", errors="replace") != dead:
                return False
            write_text(self.path, self._text)
        return True

    def _refusal(self, text: str, who: str) -> str:
        since = _entry(text).get("since")
        began = f" (since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))})" if _is_time(since) else ""
        name = self.path.name.removeprefix(".").removesuffix(".running")
        return (
            f'--output_name: {who}{began} is training under the name "{name}" in {self.path.parent}; wait for its end, '
            "or choose another --output_name or --output_dir."
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def gives_back_the_name(train: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let a trainer's run give back the name that its outputs hold, however it ends."""

    @functools.wraps(train)
    def run(trainer: Any) -> None:
        try:
            train(trainer)
        finally:
            outputs = getattr(trainer, "outputs", None)
            if outputs is not None and outputs.name_lock is not None:
                outputs.name_lock.release()

    return run


def _entry(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _mark(text: str) -> ProcessMark | None:
    return ProcessMark.parse(str(_entry(text).get("process")))


def _is_time(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1e11
