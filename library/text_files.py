"""Text that users write: read whole from regular files, parsed as TOML or JSON; whatever is wrong is one sentence."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import open_without_waiting

BYTE_LIMIT = 64 * 2**20
"""More than any file that a person writes."""

UTF_16 = "UTF-16, as some editors write it; save it as UTF-8"

BACKSLASH_HINT = r"In a string in double quotes a back-slash begins an escape: write paths with / or in single quotes."

ESCAPED = re.compile(r'"[^"\n]*\\[^"\n]*"?')


def read_text(path: Path | str, option: str = "", byte_limit: int = BYTE_LIMIT) -> str:
    """The text of a UTF-8 file without a byte-order mark; CRLF becomes LF.

    ``option`` is put before the path in messages. Raises UserError for what is not a regular file (a pipe is never
    waited for), cannot be read, is larger than ``byte_limit``, is not UTF-8 or holds zero bytes.
    """
    place = f"{option}: {path}" if option else str(path)
    try:
        with open(path, "rb", buffering=0, opener=open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{place}: is not a regular file.")
            if status.st_size > byte_limit:
                raise UserError(f"{place}: is {status.st_size:,} bytes long; at most {byte_limit:,} are read.")
            data = file.read()
        text = data.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{option}: there is no file {path}." if option else f"{path}: there is no such file."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{place}: is a folder, not a file.") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            hint = f"; it looks like {UTF_16}" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
            raise UserError(f"{place}: is not UTF-8 text ({error.reason} at byte {error.start}){hint}.") from None
        raise UserError(f"{place}: is not a path to a file ({error}).") from None
    if "\0" in text:
        raise UserError(f"{place}: is not UTF-8 text (it holds zero bytes); it may be {UTF_16}.")
    return text.replace("\r\n", "\n")


def read_toml(path: Path, option: str = "") -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError as ``read_text`` and ``parse_toml`` do."""
    return parse_toml(read_text(path, option), path)


def parse_toml(text: str, place: Path | str) -> dict[str, Any]:
    """The tables of TOML text. Raises UserError that begins with ``place`` and names the line of a syntax error."""
    import tomli

    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise UserError(f"{place}: not valid TOML: {error}.{_backslash_hint(text, str(error))}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{place}: not valid TOML: {_limit(error)}.") from None


def parse_json(text: str, place: Path | str) -> Any:
    """The value of JSON text. Raises UserError that begins with ``place`` and names the line of a syntax error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not valid JSON: {error.msg} ({where}).") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{place}: not valid JSON: {_limit(error)}.") from None


def shown(value: Any, length: int = 80) -> str:
    """A value of such a file as JSON for a message, cut at ``length`` characters."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} too deep or too large to show"
    return text if len(text) <= length else f"{text[:length]}..."


def _limit(error: Exception) -> str:
    """What a parser refuses although the syntax may be right."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "an integer has too many digits" if "digits" in str(error) else str(error).split("\n")[0].rstrip(".")


def _backslash_hint(text: str, message: str) -> str:
    """The hint about back-slashes when the line that is named has one in double quotes."""
    found = re.search(r"line (\d+)", message)
    lines = text.split("\n")
    line = lines[min(int(found[1]), len(lines)) - 1] if found else ""
    return f" {BACKSLASH_HINT}" if ESCAPED.search(line) else ""
