"""Which process wrote a file, and whether it still runs: the mark that names of temporary files and locks hold.

A process id alone says little: ids are used again, in containers the same program often has the same one, and in a
folder that machines share it is another machine's. So a mark also holds when the process started, and where: machine,
boot and the space of process ids (that of a container).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

MARK = r"([0-9a-f]{8})-(\d+)-([0-9a-f]+)"
"""The text of a mark as a regular expression: where, process id, start."""


@dataclass(frozen=True)
class ProcessMark:
    """A process, unmistakable among all that ever write into a folder."""

    where: str
    """8 hexadecimal digits for machine, boot and space of process ids."""
    pid: int
    start: str
    """When it started, in a unit of its system, as a hexadecimal number; 0 if unknown."""

    def __str__(self) -> str:
        return f"{self.where}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> ProcessMark | None:
        """The mark with this text; None for another text."""
        match = re.fullmatch(MARK, text)
        return None if match is None else cls(match[1], int(match[2]), match[3])

    @property
    def is_here(self) -> bool:
        """Whether this process can see if that one runs."""
        return self.where == _where()

    @property
    def runs(self) -> bool:
        """Whether the process still runs; only to be asked of one that ``is_here``."""
        start = _start(self.pid)
        return start is not None and (start == self.start or "0" in (start, self.start))


def this_process() -> ProcessMark:
    """The mark of the process that asks."""
    return _mark(os.getpid())


@functools.lru_cache(maxsize=1)
def _mark(pid: int) -> ProcessMark:  # a forked process is another one
    return ProcessMark(_where(), pid, _start(pid) or "0")


@functools.cache
def _where() -> str:
    parts = [host_name()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:
            continue
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def host_name() -> str:
    """The name of this machine, for messages."""
    return socket.gethostname()


def _start(pid: int) -> str | None:
    """When a process of this system started, ``0`` if that is hidden; None if no such process runs."""
    if not os.path.exists("/proc/self/stat"):
        return _start_by_psutil(pid)
    try:
        # 1234 (a name) S 1 ...: the state is the third field, the start the 22nd; a name may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return _start_if_hidden(pid)
    dead = fields[0] in ("Z", "X")  # one that nobody has waited for yet
    return None if dead else format(int(fields[19]), "x")


def _start_if_hidden(pid: int) -> str | None:
    """For systems that hide the processes of other users."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "0"
    except (OSError, OverflowError):
        return None
    return "0"


def _start_by_psutil(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return format(round(process.create_time()), "x")
    except psutil.AccessDenied:
        return "0"
    except (psutil.Error, OverflowError, ValueError):
        return None
