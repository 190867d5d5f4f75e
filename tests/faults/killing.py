"""Killing a process at a random moment, and what has to be true of the files that it leaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy
from PIL import Image
from safetensors import safe_open

from library.files import TEMPORARY_NAME
from library.training.output.state import SavedState
from tests.processes import Started


class Work(Protocol):
    """What processes do, one after another, until one has done it."""

    @property
    def folder(self) -> Path:
        """Everything that it reads and writes but models."""

    @property
    def places(self) -> list[Path]:
        """The folders where files are written."""

    def start(self) -> Started:
        """Begin it, or continue it, by one and the same command line."""


LOOK_EVERY = 0.0005


def kill_somewhere(process: Started, chance: random.Random, longest: float, folders: Sequence[Path]) -> str | None:
    """Kill a process within ``longest`` seconds: at a random moment, or then as soon as it writes a file.

    Returns when that was; None if it had ended before.
    """
    moment = chance.uniform(0, longest)
    at_writing = chance.random() < 0.5
    start = time.monotonic()
    deadline = start + moment
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    there = halves(folders)  # those that an earlier kill has left are not being written
    while at_writing and process.poll() is None and not halves(folders) - there:
        time.sleep(LOOK_EVERY)
    if process.poll() is not None:
        return None
    process.kill()
    passed = f"{time.monotonic() - start:.2f} s"
    return f"{passed}, while it wrote a file" if at_writing else passed


def kill_again_and_again(
    begin: Callable[[int], Work], kills: int, chance: random.Random, length: float
) -> Iterator[tuple[Work, str]]:
    """Make ``kills`` kills: start a work, kill it, and start it again until it has ended by itself; then a new one.

    ``begin(number)`` prepares a work in a folder of its own, ``length`` is how many seconds one takes: a work that goes
    on is killed within what is left of them, but at least a third. After each kill, every file under its name must be
    whole. Gives each work that has ended well, and when it had been killed.
    """
    made, number = 0, 0
    while made < kills:
        work, moments, left = begin(number), [], length
        while True:
            start, process = time.monotonic(), work.start()
            moment = kill_somewhere(process, chance, left, work.places) if made < kills else None
            left = max(left - (time.monotonic() - start), length / 3)
            assert broken_files(work.folder) == [], f"killed after {moments}, {moment}"
            if moment is None:
                break
            made += 1
            moments.append(moment)
        said = f"killed after {moments}:\n{process.output[-3000:]}" if process.wait() else ""
        assert process.returncode == 0, said
        assert leftovers(work.folder) == [], f"killed after {moments}"
        yield work, f"killed after {moments}"
        shutil.rmtree(work.folder)
        number += 1


def halves(folders: Sequence[Path]) -> set[str]:
    """The temporary files in these folders."""
    found = set()
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                found |= {entry.path for entry in entries if TEMPORARY_NAME.match(entry.name)}
        except OSError:
            continue
    return found


def broken_files(folder: Path) -> list[str]:
    """Files below a folder that stand under their names and are not whole."""
    return [f"{path}: {fault}" for path in sorted(folder.rglob("*")) if (fault := _fault(path)) is not None]


def _fault(path: Path) -> str | None:
    if any(TEMPORARY_NAME.match(part) for part in path.parts):
        return None
    try:
        _read(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read(path: Path) -> None:
    """Read a file or a state to its end. Raises whatever its readers raise."""
    if path.is_dir() and path.name.endswith("-state"):
        SavedState(path).optimizer_state()
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        with numpy.load(path) as arrays:
            assert all(arrays[name] is not None for name in arrays)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".html":
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def leftovers(folder: Path) -> list[str]:
    """Whatever stands below a folder under a hidden name."""
    return [str(path) for path in folder.rglob(".*")]
