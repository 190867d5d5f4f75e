"""``key=value`` lists on the command line that become keyword arguments of a class or function."""

from __future__ import annotations

import ast
import inspect
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
        if not equals or not key.isidentifier():
            raise UserError(f'--{option} "{argument}" is not of the form key=value.')
        if key in values:
            raise UserError(f'--{option}: "{key}" is given twice.')
        try:
            values[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise UserError(
                f'--{option} "{argument}": "{text}" must be a number, True, False, None, a tuple such as 0.9,0.999 '
                'or text in quotes such as "text".'
            ) from None
    return values


def check_keyword_arguments(option: str, target: Callable[..., Any], given: dict[str, Any], own: Sequence[str]) -> None:
    """Raise UserError for a key in ``given`` that ``target`` does not take, or that is set elsewhere (``own``)."""
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
