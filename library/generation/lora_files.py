"""Which LoRA files an inference script puts into its models, and how strongly: ``path`` or ``path;multiplier``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import UserError


@dataclass
class LoraFileOptions:
    """LoRA"""

    lora_weights: list[str] = field(default_factory=list)
    """LoRA or OFT files, each as path or "path;multiplier"; they act together."""
    merge_lora_weights: bool = False
    """Merge them into the model's weights: as fast as the model alone, but multipliers stay as they are."""


@dataclass(frozen=True)
class LoraFile:
    """A file and its strength."""

    path: Path
    multiplier: float

    def __str__(self) -> str:
        return f"{self.path.name};{self.multiplier:g}"


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
