"""``key=value`` lists on the command line that become keyword arguments of a class or function."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from library.errors import UserError, did_you_mean


def parse_keyword_arguments(option: str, arguments: Sequence[str]) -> dict[str, Any]:
    """``["betas=0.9,0.999", "amsgrad=True"]`` -> ``{"betas": (0.9, 0.999), "amsgrad": True}``.

    Values are Python literals (text needs quotes). Raises UserError that names ``option`` and the argument.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip()
        argument = _cut(argument)
        if not equals or not key.isidentifier():
            raise UserError(f'--{option} "{argument}" is not of the form key=value.')
        if key in values:
            raise UserError(f'--{option}: "{key}" is given twice.')
        try:
            values[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise UserError(
                f'--{option} "{argument}": "{_cut(text)}" must be a number, True, False, None, a tuple such as '
                '0.9,0.999 or text in quotes such as "text".'
            ) from None
        if not _is_finite(values[key]):
            raise UserError(f'--{option} "{argument}": numbers must be finite.')
    return values


def _cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _is_finite(value: Any) -> bool:
    """Whether every float in a literal is."""
    if isinstance(value, (tuple, list, set)):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def check_keyword_arguments(option: str, target: Callable[..., Any], given: dict[str, Any], own: Sequence[str]) -> None:
    """Raise UserError for a key in ``given`` that ``target`` does not take, or that is set elsewhere (``own``).

    A value that is of another kind than the default is refused too: text or a tuple where a number is due, a tuple of
    another length.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in own]
    name = getattr(target, "__name__", str(target))
    for key in given:
        if key in own:
            raise UserError(f'--{option}: "{key}" has its own option; leave it out here.')
        if key not in known and not takes_any:
            raise UserError(f'--{option}: {name} has no argument "{key}".{did_you_mean(key, known)}')
        if key in parameters and (wanted := _other_kind(given[key], parameters[key].default)):
            raise UserError(f"--{option}: {key} of {name} must be {wanted}, not {_cut(repr(given[key]))}.")


def _other_kind(value: Any, default: Any) -> str:
    """What a value would have to be that is of another kind than its default; empty where it may be right."""
    if isinstance(default, tuple):
        sizes = f"{len(default)} numbers such as {','.join(map(str, default))}"
        numbers = isinstance(value, (tuple, list)) and all(isinstance(part, (int, float)) for part in value)
        return "" if value is None or (numbers and len(value) == len(default)) else sizes
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return f"a number such as {default}" if isinstance(value, (str, bytes, tuple, set, dict)) else ""
    return "text in quotes" if isinstance(default, str) and isinstance(value, (int, float, tuple)) else ""
