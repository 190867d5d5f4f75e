"""Files of options as the studio writes them: flat TOML that any ``--config_file`` takes, and any text editor too."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.options import SCRIPT
from library.text_files import parse_toml, read_text

BYTE_LIMIT = 1 << 20
"""Of a file of options; the studio reads no larger one."""


def value_text(value: Any) -> str:
    """A value of TOML (texts, numbers, truth values, dates, lists and tables of them) as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key_text(key)} = {value_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return repr(value)


def key_text(key: str) -> str:
    """A key as TOML: bare where that is allowed."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else value_text(key)


def lines_of(values: Mapping[str, Any]) -> str:
    """Keys and their values, one a line."""
    return "".join(f"{key_text(key)} = {value_text(value)}\n" for key, value in values.items())


def settings_text(script: str, values: Mapping[str, Any]) -> str:
    """A file of options of a script (``flux_train_network.py``)."""
    return lines_of({SCRIPT: script, **values})


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a file of options, those of its sections among them. Raises UserError for what is no TOML."""
    return flat_keys(read_text(path, byte_limit=BYTE_LIMIT), path)


def flat_keys(text: str, place: Path | str) -> dict[str, Any]:
    """The same of a text; ``place`` names it in messages."""
    flat: dict[str, Any] = {}
    for key, value in parse_toml(text, place).items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def title_of(path: Path) -> str:
    """What the first line of a file of options says of it, if that is a comment; otherwise its name."""
    first = read_text(path, byte_limit=BYTE_LIMIT).partition("\n")[0]
    return first.removeprefix("#").strip().rstrip(":.") if first.startswith("#") else path.stem
