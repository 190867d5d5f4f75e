"""What fuzzing is made of: senseless values, sound text with mistakes in it, and a reader's duties."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from library.errors import UserError
from tests.faults.corpus import MARKUP, SURPRISING

SECONDS = 10.0
"""Processor time within which every input must have its answer; far more than any takes."""
THOROUGH = hypothesis.settings().max_examples > 1000


def inputs(count: int, thorough: int = 25) -> Callable[[Any], Any]:
    """As many inputs in an ordinary run, always the same ones; ``thorough`` times as many with ``--thorough``."""
    return settings(
        max_examples=count * thorough if THOROUGH else count,
        derandomize=not THOROUGH,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class TookTooLong(BaseException):
    """An input kept its reader busy for ``SECONDS``."""


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Ends what takes longer than ``SECONDS`` of processor time, where the system can; else it fails afterwards."""

    def end(*_: object) -> None:
        raise TookTooLong

    can_interrupt = hasattr(signal, "SIGVTALRM") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, end) if can_interrupt else None
    started = time.process_time()
    if can_interrupt:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        if can_interrupt:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    assert time.process_time() - started < SECONDS


def endured(read: Callable[[], Any], *places: object) -> Any:
    """The result of ``read``, or the sentence of its UserError, which must hold one of ``places``; nothing else.

    An error of another kind comes out of this function and fails the test, as a hang does.
    """
    with without_waiting():
        try:
            return read()
        except UserError as error:
            said = str(error)
    assert said.strip() and len(said) < 20_000, said[:500]
    assert not places or any(str(place) in said for place in places), f"{said[:500]!r} names none of {places}"
    return said


# ---- values ----------------------------------------------------------------------------------------------------------

NASTY = (
    *("", " ", "\0", "a\0b", "nan", "inf", "-inf", "1e999", "-1", "0", "1.5", "true", "None", "null", "9" * 400),
    *(
        "../x",
        "/dev/zero",
        "/",
        ".",
        "..",
        "~",
        "C:\\new\\table",
        "con",
        "a" * 5000,
        "\ud83d\ude00",
        "\u202e",
        "\ufeff",
    ),
    *("%s%n", "{0}", "${HOME}", "$(id)", "{a|b", "((((", "[" * 500, "*" * 50, "(a+)+$", "=", "==", "a=b=c", "--", "-"),
    *("__import__('os')", "[0]*10**9", "1,2", "(1,", "b'x'", "{1:[2]}", "1_0", "0x10", "١٢", MARKUP, SURPRISING),
)
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))
integers = st.one_of(st.integers(-3, 100), st.sampled_from((2**31, 2**63, 2**64, -(2**63), 10**30, 10**400)))
floats = st.one_of(st.floats(), st.sampled_from((0.0, -0.0, 0.5, 1.0, math.inf, math.nan, 1e308, 5e-324)))
scalars = st.one_of(st.booleans(), integers, floats, texts)
nested = st.recursive(
    st.one_of(st.none(), scalars),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def tables(known: Mapping[str, st.SearchStrategy[Any]] | list[str], most: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    """Tables with known keys and others; ``known`` may give sensible values, which occur as often as senseless ones."""
    names = list(known)
    sensible = known if isinstance(known, Mapping) else {}
    pairs = st.one_of(
        st.sampled_from(names).flatmap(
            lambda name: st.tuples(st.just(name), st.one_of(sensible[name], nested) if name in sensible else nested)
        ),
        st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), scalars)),
        st.tuples(texts, nested),
    )
    return st.lists(pairs, max_size=most).map(dict)


def mistaken(text: str) -> st.SearchStrategy[str]:
    """A sound text in which a few places were cut, doubled, or filled with something else."""
    places = st.integers(0, len(text))

    def change(edits: list[tuple[int, int, str]]) -> str:
        changed = text
        for start, length, new in edits:
            changed = changed[:start] + new + changed[start + length :]
        return changed

    filling = st.one_of(texts, st.sampled_from(("\n", '"', "'", "[", "]", "{", "}", "=", ",", ":", "\\", "#", "\r")))
    return st.lists(st.tuples(places, st.integers(0, 8), filling), min_size=1, max_size=4).map(change)


def mistaken_bytes(data: bytes, head: int = 400) -> st.SearchStrategy[bytes]:
    """Sound bytes in which a few, mostly among the first ``head``, were changed, or which end too soon."""
    places = st.one_of(st.integers(0, min(head, len(data) - 1)), st.integers(0, len(data) - 1))

    def change(edits: list[tuple[int, int]], end: int | None) -> bytes:
        changed = bytearray(data)
        for place, value in edits:
            changed[place] = value
        return bytes(changed[:end])

    ends = st.one_of(st.none(), st.none(), st.integers(0, len(data)))
    return st.builds(change, st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6), ends)


# ---- files -----------------------------------------------------------------------------------------------------------


def toml_of(tables_by_name: Mapping[str, Any]) -> str:
    """A value as TOML, whatever it is: what TOML has no words for becomes text."""
    return "\n".join(f"{_toml_text(key)} = {_toml(value)}" for key, value in tables_by_name.items()) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**300 else "1" + "0" * 300
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_text(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _toml_text("" if value is None else str(value))


def _toml_text(text: str) -> str:
    """JSON's way is TOML's too, but for halves of surrogate pairs."""
    return json.dumps(text.encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False).replace("\x7f", "\\u007f")


def json_of(value: Any) -> str:
    """A value as Python's JSON writes it, with NaN and infinity."""
    return json.dumps(value)
