"""network_args: strings "name=value" become typed values; a wrong one is refused with one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from library.errors import UserError, did_you_mean

Parser = Callable[[str, Any], Any]


def _refuse(name: str, value: Any, wanted: str) -> UserError:
    return UserError(f'--network_args: {name} must be {wanted}, not "{value}".')


def flag(name: str, value: Any) -> bool:
    """true or false, in any case. Raises UserError."""
    if isinstance(value, bool):
        return value
    if str(value).strip().lower() in ("true", "false"):
        return str(value).strip().lower() == "true"
    raise _refuse(name, value, "True or False")


def whole_number(name: str, value: Any) -> int:
    """A rank: a whole number, 0 meaning no LoRA there."""
    try:
        number = int(value)
        is_whole = number == float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refuse(name, value, "a whole number") from None
    if number < 0 or not is_whole:
        raise _refuse(name, value, "a whole number, 0 or more")
    return number


def number(name: str, value: Any) -> float:
    """A finite number, 0 or more. Raises UserError."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refuse(name, value, "a number") from None
    if not math.isfinite(result) or result < 0:
        raise _refuse(name, value, "a number, 0 or more")
    return result


def probability(name: str, value: Any) -> float:
    """A number from 0 to below 1. Raises UserError."""
    result = number(name, value)
    if result >= 1:
        raise _refuse(name, value, "at least 0 and below 1")
    return result


def unavailable(reason: str) -> Parser:
    """A parser for a common argument that has no meaning here; ``reason``, a whole sentence, says why.

    What switches the argument off is accepted: false, and 0 as configuration files write it.
    """

    def parse(name: str, value: Any) -> None:
        if str(value).strip().lower() not in ("false", "0", "0.0"):
            raise UserError(f"--network_args: {name} cannot be used here. {reason}")

    return parse


def text(name: str, value: Any) -> str:
    """The text as it is."""
    return str(value)


def choice(*choices: str) -> Parser:
    """A parser that takes one of ``choices`` and raises UserError for anything else."""

    def parse(name: str, value: Any) -> str:
        if value not in choices:
            raise _refuse(name, value, f"one of {', '.join(choices)}")
        return value

    return parse


def whole_numbers(count: int, labels: str) -> Parser:
    """``count`` ranks as "[4,2,2,2,4]" or "4,2,2,2,4"."""

    def parse(name: str, value: Any) -> list[int]:
        parts = value if isinstance(value, list | tuple) else str(value).strip().strip("[]").split(",")
        if len(parts) != count:
            raise _refuse(name, value, f"{count} whole numbers separated by commas ({labels})")
        return [whole_number(name, part) for part in parts]

    return parse


# A value is the number that ends the entry, so that patterns may hold "=" and "," (as in "\d{1,2}").
_PATTERN_ENTRY = re.compile(r"\s*(?P<pattern>.+?)\s*=\s*(?P<value>[0-9.eE+-]+)\s*(?:,|$)")

PatternValues = list[tuple[re.Pattern[str], Any]]


def patterns(parse_value: Parser) -> Parser:
    """ "pattern=value,pattern=value": regular expressions that are searched in the names of LoRA modules."""

    def parse(name: str, value: Any) -> PatternValues:
        position, entries = 0, []
        while position < len(value):
            match = _PATTERN_ENTRY.match(value, position)
            if match is None:
                raise _refuse(name, value[position:], '"pattern=number" or several of them separated by commas')
            try:
                pattern = re.compile(match["pattern"])
            except re.error as error:
                raise UserError(
                    f'--network_args: {name} has the pattern "{match["pattern"]}", which is not a regular expression'
                    f" ({error})."
                ) from None
            entries.append((pattern, parse_value(name, match["value"])))
            position = match.end()
        return entries

    return parse


def last_match(entries: PatternValues | None, name: str) -> int | None:
    """Index of the last entry whose pattern is found in ``name``; None when none is."""
    matches = [index for index, (pattern, _) in enumerate(entries or []) if pattern.search(name)]
    return matches[-1] if matches else None


COMMON_ARGUMENTS: Mapping[str, Parser] = {
    "conv_dim": whole_number,
    "conv_alpha": number,
    "dropout": probability,
    "rank_dropout": probability,
    "module_dropout": probability,
    "network_reg_dims": patterns(whole_number),
    "network_reg_lrs": patterns(number),
    "ggpo_sigma": number,
    "ggpo_beta": number,
    "loraplus_lr_ratio": number,
    "loraplus_unet_lr_ratio": number,
    "loraplus_text_encoder_lr_ratio": number,
    "split_qkv": flag,
    "verbose": flag,
}


# What these say also holds for a network whose modules and ranks are those of a file.
LEARNING_ARGUMENTS = frozenset(COMMON_ARGUMENTS) - {"conv_dim", "conv_alpha", "network_reg_dims"}


def parse_arguments(given: Mapping[str, Any], family_arguments: Mapping[str, Parser], module: str) -> dict[str, Any]:
    """Typed values of all known arguments, None where not given (or given as None).

    Raises UserError for an unknown argument, naming the nearest known one, and for a value of the wrong kind.
    """
    known = {**COMMON_ARGUMENTS, **family_arguments}
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f" It knows {', '.join(sorted(known))}."
            raise UserError(f'--network_args: {module} has no argument "{name}".{hint}')
    arguments = {name: None if given.get(name) is None else parse(name, given[name]) for name, parse in known.items()}
    if (arguments["ggpo_sigma"] is None) != (arguments["ggpo_beta"] is None):
        missing = "ggpo_beta" if arguments["ggpo_beta"] is None else "ggpo_sigma"
        raise UserError(f'--network_args: GGPO needs both ggpo_sigma and ggpo_beta; "{missing}" is missing.')
    return arguments
