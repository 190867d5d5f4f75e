"""Runs that go on without the page: a folder for each, and a small process that starts it, waits and notes its end.

The keeper (``keep``) is a process of its own session. It is the parent of what it runs, so that it knows the exit code
and can never signal a stranger; the page asks it to stop by a file in the run's folder. A page that was closed and
started again finds the folders, and by the keeper's mark it knows whether a run still goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from library.child_processes import end_at_once, press_ctrl_c
from library.errors import UserError
from library.files import write_text
from library.processes import ProcessMark, this_process
from library.text_files import parse_json, read_text

RECORD, LOG, SETTINGS, KEEPER, END, STOP = "run.json", "run.log", "settings.toml", "keeper", "end.json", "stop"
"""Files of a run's folder: what it is, what it says, its options, the keeper's mark, how it ended, wishes to stop."""
BEGINS = 30.0
"""Seconds in which a keeper that was started has written its mark."""
POLL = 0.1
"""Seconds between two looks of a keeper at its process and at wishes."""
TAIL = 64 * 1024
"""Bytes of a log that the page shows."""
RUN_ID = re.compile(r"\d{8}-\d{6}-[\w.-]{1,100}")
Kind = Literal["training", "images", "check", "data", "queue"]
State = Literal["running", "finished", "stopped", "failed", "lost"]


@dataclass
class Record:
    """What a run is: ``run.json``."""

    kind: Kind
    name: str
    """Of its job."""
    script: str
    words: list[str]
    """The command."""
    folder: str
    """In which it runs."""
    started: float
    """Seconds since 1970, of its last start."""
    output_dir: str = ""
    output_name: str = ""
    saves_states: bool = False
    starts: int = 1
    first_started: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    """What is set beside the page's own environment."""

    def __post_init__(self) -> None:
        self.first_started = self.first_started or self.started


class Run:
    """A run in its folder."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def read(cls, folder: Path) -> Run | None:
        """The run of a folder; None where there is none, or what it says cannot be read."""
        try:
            entry = parse_json(read_text(folder / RECORD, byte_limit=1 << 20), folder / RECORD)
            return cls(folder, Record(**entry))
        except (UserError, TypeError):
            return None

    @property
    def id(self) -> str:
        """Its folder's name."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """What it says."""
        return self.folder / LOG

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs, or where nobody has noted it."""
        return self._end().get("code")

    @property
    def ended(self) -> float | None:
        """When it ended, seconds since 1970."""
        return self._end().get("time")

    @property
    def wishes(self) -> int:
        """How often it was asked to stop."""
        return _count(self.folder / STOP)

    @property
    def state(self) -> State:
        """How it is now. ``lost``: it ended without a word, as when the machine was switched off."""
        end = self._end()
        if end:
            if self.wishes:
                return "stopped"
            return "finished" if end.get("code") == 0 else "failed"
        if self._keeper_runs():
            return "running"
        return "lost" if not self._end() else self.state  # it may have ended between the two looks

    def write(self) -> None:
        """Write ``run.json``."""
        write_text(self.folder / RECORD, json.dumps(asdict(self.record), indent=1))

    def stop(self) -> None:
        """Ask for its end, as Ctrl-C does: after the step in hand; asked again, at once."""
        if self.state == "running":
            write_text(self.folder / STOP, str(self.wishes + 1))

    def tail(self, limit: int = TAIL) -> str:
        """The end of its log, with each progress bar as it was drawn last."""
        return tail_of(self.log, limit)

    @property
    def progress(self) -> dict[str, Any] | None:
        """What the last progress bar in its log says, as ``progress_of``."""
        return progress_of(self.tail())

    def _end(self) -> dict[str, Any]:
        with contextlib.suppress(UserError):
            entry = parse_json(read_text(self.folder / END), END)
            return entry if isinstance(entry, dict) else {}
        return {}

    def _keeper_runs(self) -> bool:
        with contextlib.suppress(OSError):
            mark = ProcessMark.parse((self.folder / KEEPER).read_text(encoding="utf-8").strip())
            return mark is not None and mark.is_here and mark.runs
        return time.time() - self.record.started < BEGINS


def _count(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def tail_of(log: Path, limit: int = TAIL) -> str:
    """The end of a log, at most ``limit`` bytes, with each progress bar as it was drawn last."""
    try:
        with open(log, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            text = file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""
    if size > limit:
        text = text.partition("\n")[2]
    drawn = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return "\n".join(line.rstrip() for line in drawn)


PROGRESS = re.compile(r"^([^:\n]*):\s+\d+%\|[^|]*\|\s*(\d+)/(\d+) \[([^\]]*)\]", re.MULTILINE)


def progress_of(text: str) -> dict[str, Any] | None:
    """What the last progress bar of a log's end says: its name, done, all, and the words behind them."""
    found = list(PROGRESS.finditer(text))
    if not found:
        return None
    name, done, total, more = found[-1].groups()
    return {"name": name.strip(), "done": int(done), "total": int(total), "more": more}


class Runs:
    """The runs below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keepers: list[subprocess.Popen[bytes]] = []

    def all(self) -> list[Run]:
        """Every run, the newest first."""
        if not self.folder.is_dir():
            return []
        found = [Run.read(folder) for folder in self.folder.iterdir() if RUN_ID.fullmatch(folder.name)]
        return sorted((run for run in found if run), key=lambda run: (run.record.started, run.id), reverse=True)

    def get(self, run_id: str) -> Run | None:
        """The run of an id; None for any other text."""
        return Run.read(self.folder / run_id) if RUN_ID.fullmatch(run_id) else None

    def start(self, record: Record, settings: str | None = None) -> Run:
        """Start a run in a new folder; ``settings`` is the text of its options, which its command names."""
        moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(record.started))
        number = 1
        while True:
            more = "" if number == 1 else f"-{number}"
            folder = self.folder / f"{moment}-{record.name}{more}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
            number += 1
        record.words = [word.replace("{folder}", str(folder)) for word in record.words]
        if settings is not None:
            write_text(folder / SETTINGS, settings)
        run = Run(folder, record)
        run.write()
        self.start_keeper(run)
        return run

    def resume(self, run: Run, words: Sequence[str]) -> None:
        """Start a run that has ended again, with another command, in its folder. Raises UserError while it runs."""
        if run.state == "running":
            raise UserError(f"{run.record.name} is running.")
        for name in (KEEPER, STOP, END):
            (run.folder / name).unlink(missing_ok=True)
        run.record.words, run.record.started, run.record.starts = list(words), time.time(), run.record.starts + 1
        run.write()
        self.start_keeper(run)

    def start_keeper(self, run: Run) -> None:
        """Start the process that keeps a run; it belongs to no terminal and outlives the page."""
        script = Path(__file__).resolve().parents[2] / "tools" / "studio.py"
        how: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            how = {"creationflags": 0x08000000}  # CREATE_NO_WINDOW: a console of its own, for Ctrl-C in it
        with open(run.log, "ab") as log:
            self._keepers = [keeper for keeper in self._keepers if keeper.poll() is None]
            words = [sys.executable, str(script), "--keep", str(run.folder)]
            nothing = subprocess.DEVNULL
            self._keepers.append(subprocess.Popen(words, stdin=nothing, stdout=log, stderr=log, **how))


# ---- the keeper ------------------------------------------------------------------------------------------------------

Start = Callable[[list[str], IO[bytes], Record], Any]


def _start(words: list[str], log: IO[bytes], record: Record) -> subprocess.Popen[bytes]:
    """Start a run's command."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **record.environment}
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=record.folder, env=variables)


def keep(folder: Path, start: Start = _start) -> int:
    """Run what a run's folder says until its end, pass on wishes to stop, note the exit code, and return it."""
    run = Run.read(folder)
    if run is None:
        raise UserError(f"{folder} is not the folder of a run.")
    write_text(folder / KEEPER, str(this_process()))
    code = 1
    try:
        with open(run.log, "ab") as log:
            log.write(f"$ {shlex.join(run.record.words)}\n".encode("utf-8", "replace"))
            log.flush()
            try:
                process = start(run.record.words, log, run.record)
            except OSError as error:
                log.write(f"error: {run.record.words[0]} cannot be started ({error.strerror}).\n".encode())
                return code
            code = _wait(process, run)
    finally:
        write_text(folder / END, json.dumps({"code": code, "time": time.time()}))
    return code


def _wait(process: Any, run: Run) -> int:
    """Wait for a process; each wish to stop that is new is passed on as Ctrl-C, the third one ends it."""
    heard = 0
    while (code := process.poll()) is None:
        while heard < run.wishes:
            heard += 1
            press_ctrl_c(process) if heard < 3 else end_at_once(process)
        time.sleep(POLL)
    return int(code)
