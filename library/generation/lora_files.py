"""Which LoRA files an inference script puts into its models, and how strongly: ``path`` or ``path;multiplier``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.safetensors_io import read_header

MOST_NAMES = 3
"""Modules that a message names."""


@dataclass
class LoraFileOptions:
    """LoRA"""

    lora_weights: list[str] = field(default_factory=list)
    """LoRA or OFT files, each as path or "path;multiplier"; they act together."""
    merge_lora_weights: bool = False
    """Merge them into the model's weights: as fast as the model alone, but multipliers stay as they are."""


@dataclass(frozen=True)
class LoraFile:
    """A file, its strength, and which of its modules act."""

    path: Path
    multiplier: float
    include: str = ""
    """Regular expression that the name of a module holds; empty: all do."""
    exclude: str = ""
    """Regular expression that it does not hold; empty: none does."""

    def __str__(self) -> str:
        return f"{self.path.name};{self.multiplier:g}"

    def keeps(self, key: str) -> bool:
        """Whether the tensor of this key belongs to a module that acts."""
        module = module_of(key)
        return bool(re.search(self.include, module)) and not (self.exclude and re.search(self.exclude, module))


def module_of(key: str) -> str:
    """The name of the module that a key of a LoRA file belongs to."""
    first, _, _ = key.partition(".")
    if first.startswith(("lora_", "lycoris_", "oft_")):
        return first
    return re.sub(r"\.(lora|lora_\w+|alpha|dora_scale)(\..*)?$", "", key)


def left_out(names: Iterable[str], of: Iterable[str]) -> str:
    """The message about modules ``names`` of a file with the modules ``of`` for which a model has no layer."""
    absent = list(dict.fromkeys(names))
    more = f" and {len(absent) - MOST_NAMES} more" if len(absent) > MOST_NAMES else ""
    return (
        f"{len(absent)} of its {len(set(of))} modules fit no layer of this model or lack a tensor, and are left out, "
        f"so that the file acts only in part: {', '.join(absent[:MOST_NAMES])}{more}"
    )


def check_pattern(pattern: str, place: str) -> None:
    """Raises UserError beginning with ``place`` for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f'{place}: "{pattern}" is not a regular expression ({error}).') from None


def one_each(files: Sequence[str], values: Sequence[Any], missing: Any) -> list[Any]:
    """A value for each of ``files``: those that are given, then ``missing``."""
    return [*values[: len(files)], *[missing] * (len(files) - len(values))]


def parse_lora_files(options: LoraFileOptions) -> list[LoraFile]:
    """The files of ``--lora_weights``. Raises UserError for one that is missing and for a multiplier that is none."""
    files = []
    for given in options.lora_weights:
        name, semicolon, multiplier = given.rpartition(";")
        if not semicolon or Path(given).is_file():  # a file's own name may hold a semicolon
            name, semicolon = given, ""
        path = Path(name.strip())
        strength = _number(multiplier, f'--lora_weights: "{given}"') if semicolon else 1.0
        if ";" in name and not path.is_file():
            raise UserError(f'--lora_weights: "{given}" has more than one semicolon; write "path;0.8".')
        if not path.is_file():
            raise UserError(f"--lora_weights: there is no file {path}.")
        files.append(LoraFile(path, strength))
    return files


def trigger_word(files: Sequence[LoraFile]) -> str | None:
    """The words that call up what these files were trained on, as their metadata says; None if none of them does.

    Raises UserError for a file that cannot be read.
    """
    found: dict[str, None] = {}
    for file in files:
        metadata = read_header(file.path).metadata if file.path.suffix == ".safetensors" else {}
        if word := metadata.get("ss_trigger_word") or metadata.get("modelspec.trigger_phrase"):
            found[word] = None
    return ", ".join(found) or None


def parse_multipliers(text: str, count: int, place: str) -> list[float]:
    """Numbers joined by commas, one for each of ``count`` files. Raises UserError beginning with ``place``."""
    parts = text.split(",")
    if len(parts) != count:
        raise UserError(f"{place} needs one number for each of the {count} LoRA files; {len(parts)} given.")
    return [_number(part, place) for part in parts]


def check_not_merged(options: LoraFileOptions, place: str) -> None:
    """Raises UserError beginning with ``place`` where multipliers cannot change any more."""
    if options.merge_lora_weights:
        raise UserError(f"{place} cannot change files that were merged; leave out --merge_lora_weights.")


def _number(text: str, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f'{place}: a multiplier must be a number, not "{text.strip()}"; write "path;0.8".')
    return number
