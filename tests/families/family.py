"""What the conformance tests need to know of a model family: a tiny model, and the command line that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.families import by_model


@dataclass(frozen=True)
class Family:
    """A tiny model of a family in the real files' layouts, and how the scripts are called with it.

    A model that a row of ``library/families.py`` names has a file beside this one with its name; the tests in
    ``tests/conformance/`` run for it.
    """

    name: str
    """Its short name in ``library/families.py``."""
    make: Callable[[Path], Any]
    """Writes the tiny model into a folder; returns its files."""
    command: Callable[[Any], list[object]]
    """Options of the script that name these files and a small quick LoRA."""
    idle: str
    """Options that are accepted and have no effect for this family."""
    caches: tuple[str, str]
    """Endings of the files of cached latents and captions."""
    planned: str
    """Options of the run whose plan is compared with what is built: those that are special to build or to simulate."""
    drawing: Callable[[Any], list[object]] = lambda files: []
    """Options of the inference script that name the files."""
    dtypes: tuple[str, ...] = ("--dtype",)
    """Options of the inference script that name the dtypes of all parts."""
    lora_option: str = "--lora_weights"
    """Option of the inference script that names LoRA files."""
    output_option: str = "--output_dir"
    """Option of the inference script that names the folder for images."""
    guidance: str = "--g"
    """Guidance in a prompt that training and the inference script take the same."""

    @property
    def script(self) -> str:
        """The training script."""
        return by_model(self.name).file

    @property
    def inference(self) -> str | None:
        """The script that draws images with this family."""
        module = by_model(self.name).inference_script
        return f"{module}.py" if module else None


def small_lora(network_module: str) -> list[object]:
    """Options of a small LoRA that learns quickly."""
    return ["--network_module", network_module, "--network_dim", "4", "--learning_rate", "1e-3", "--seed", "7"]
