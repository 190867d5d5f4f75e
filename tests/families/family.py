"""What the conformance tests need to know of a model family: a tiny model, and the command line that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """A tiny model of a family in the real files' layouts, and how the scripts are called with it.

    A new family is a file beside this one and an entry in ``tests/families/families.py``; the tests in
    ``tests/conformance/`` then run for it.
    """

    name: str
    script: str
    make: Callable[[Path], Any]
    """Writes the tiny model into a folder; returns its files."""
    command: Callable[[Any], list[object]]
    """Options of the script that name these files and a small quick LoRA."""
    idle: str
    """Options that are accepted and have no effect for this family."""
    caches: tuple[str, str]
    """Endings of the files of cached latents and captions."""
    inference: str | None = None
    """The script that draws images with this family."""
    drawing: Callable[[Any], list[object]] = lambda files: []
    """Options of the inference script that name the files."""


def small_lora(network_module: str) -> list[object]:
    """Options of a small LoRA that learns quickly."""
    return ["--network_module", network_module, "--network_dim", "4", "--learning_rate", "1e-3", "--seed", "7"]
