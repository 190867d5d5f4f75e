"""Killing a process at a random moment, and what has to be true of the files that it leaves."""

from __future__ import annotations

import json
import os
import random
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image
from safetensors import safe_open

from library.files import TEMPORARY_NAME
from library.training.output.state import SavedState
from tests.processes import Started

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
