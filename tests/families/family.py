"""What the conformance tests need to know of a model family: a tiny model, and the command line that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    dtypes: Mapping[str, Sequence[str]] = field(default_factory=lambda: dtype_options("--dtype"))
    """Options of the inference script that give all parts a dtype, by its name."""
    lora_option: Sequence[str] = ("--lora_weights",)
    """What stands before a LoRA file among the options of the inference script."""
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


def dtype_options(*options: str) -> dict[str, Sequence[str]]:
    """For ``Family.dtypes`` where these options name dtypes."""
    return {dtype: [word for option in options for word in (option, dtype)] for dtype in ("fp32", "bf16")}


def small_lora(network_module: str) -> list[object]:
    """Options of a small LoRA that learns quickly."""
    return ["--network_module", network_module, "--network_dim", "4", "--learning_rate", "1e-3", "--seed", "7"]
