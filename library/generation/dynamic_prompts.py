"""Dynamic prompts: ``a {red|blue} cat`` chooses, ``a {e$$red|blue} cat`` makes one prompt of each.

``{`` [``e$$``] [N or N-M ``$$``] [separator ``$$``] v1 ``|`` v2 ... ``}``: N of the variants, without repetition,
joined by the separator (", " by default). Groups may be nested; ``\\{`` and ``\\}`` are braces that mean themselves, as
do braces without a partner and ``{}``. Grammar and random choices are those of kohya-ss/sd-scripts' image generation,
so a seed chooses the same there.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from library.errors import UserError

SEPARATOR = ", "
MOST_PROMPTS = 100_000
"""More than anybody waits for; a line that gives more is a mistake."""
DEEPEST = 100
"""Nested groups."""

OPEN, CLOSE = "\ue000", "\ue001"  # stand for braces that mean themselves (private use, in no text)
ENUMERATED = re.compile(r"[eE]\$\$")
COUNT = re.compile(r"([\d-]+)\$\$")
JOINED_BY = re.compile(r"([^|{}]*?)\$\$")


def expand(line: str, seeds: Sequence[int], place: str = "prompt") -> list[list[str]]:
    """The prompts of a line: for each of ``seeds`` those that its enumerated groups give, at least one.

    The other groups choose by ``random.Random(seed)``, so a seed always gives the same prompt. Raises UserError,
    beginning with ``place``, for a count that is none and for a line that gives too many prompts.
    """
    written = _enumerations(_marked(line, place), place)
    return [[_plain(_chosen(prompt, seed, place)) for prompt in written] for seed in seeds]


def is_dynamic(line: str) -> bool:
    """Whether a line holds a group."""
    return "{" in _marked(line, "prompt")


def variant_count(line: str, place: str = "prompt") -> int:
    """How many prompts the enumerated groups of a line give for each seed. Raises UserError as ``expand`` does."""
    return len(_enumerations(_marked(line, place), place))


def escaped(text: str) -> str:
    """``text`` with its braces meaning themselves."""
    return re.sub(r"[{}]", r"\\\g<0>", text)


def _marked(line: str, place: str) -> str:
    """The line with every brace replaced that is not one of a group."""
    marked = list(line.replace(r"\{", OPEN).replace(r"\}", CLOSE))
    opened: list[int] = []
    for position, character in enumerate(marked):
        if character == "{":
            opened.append(position)
            if len(opened) > DEEPEST:
                raise UserError(f"{place}: more than {DEEPEST} braces are nested.")
        elif character == "}":
            start = opened.pop() if opened else None
            if start is None:
                marked[position] = CLOSE
            elif start == position - 1:
                marked[start], marked[position] = OPEN, CLOSE
    for start in opened:
        marked[start] = OPEN
    return "".join(marked)


def _plain(text: str) -> str:
    return text.replace(OPEN, "{").replace(CLOSE, "}")


@dataclass(frozen=True)
class _Group:
    """What stands between two braces."""

    enumerated: bool
    least: int
    most: int
    separator: str
    variants: list[str]


def _group(body: str, place: str) -> _Group:
    """Read the text between two braces; groups that are nested in its variants stay as they are."""
    enumerated = ENUMERATED.match(body)
    body = body[enumerated.end() :] if enumerated else body
    count = COUNT.match(body)
    body = body[count.end() :] if count else body
    joined_by = JOINED_BY.match(body)
    body = body[joined_by.end() :] if joined_by else body
    variants = _split(body)
    counts = [min(number, len(variants)) for number in _range(count[1] if count else "1", place)]
    return _Group(bool(enumerated), min(counts), max(counts), joined_by[1] if joined_by else SEPARATOR, variants)


def _range(text: str, place: str) -> list[int]:
    """N or N-M as numbers."""
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})?", text):
        raise UserError(f'{place}: "{text}$$" in braces must be a number or a range such as 1-2$$.')
    return [int(number) for number in text.split("-")]


def _split(body: str) -> list[str]:
    """The variants between the ``|`` that stand in no nested group."""
    parts, depth = [""], 0
    for character in body:
        depth += (character == "{") - (character == "}")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """The text in pieces: whether a piece is a group, and its text, without the group's outer braces."""
    depth, start = 0, 0
    for position, character in enumerate(text):
        if character == "{":
            if depth == 0:
                yield False, text[start:position]
                start = position + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                yield True, text[start:position]
                start = position + 1
    yield False, text[start:]


def _enumerations(text: str, place: str) -> list[str]:
    """Every text that the enumerated groups give, in the order of itertools; groups that choose stay in it."""
    if not re.search(r"\{[eE]\$\$", text):
        return [text]
    alternatives = [_alternatives(piece, place) if is_group else [piece] for is_group, piece in _pieces(text)]
    return _limited(("".join(parts) for parts in itertools.product(*alternatives)), place)


def _alternatives(body: str, place: str) -> list[str]:
    """What may stand in the place of a group."""
    if not ENUMERATED.match(body):
        return [f"{{{inner}}}" for inner in _enumerations(body, place)]
    group = _group(body, place)
    each = [_enumerations(variant, place) for variant in group.variants]
    return _limited(
        (
            group.separator.join(parts)
            for count in range(group.least, group.most + 1)
            for chosen in itertools.combinations(each, count)
            for parts in itertools.product(*chosen)
        ),
        place,
    )


def _limited(texts: Iterable[str], place: str) -> list[str]:
    found = list(itertools.islice(texts, MOST_PROMPTS + 1))
    if len(found) > MOST_PROMPTS:
        raise UserError(f"{place}: the groups {{e$$...}} give more than {MOST_PROMPTS:,} prompts.")
    return found


def _chosen(text: str, seed: int, place: str) -> str:
    """The text with every group replaced by a choice: level by level, innermost first, from right to left."""
    while "{" in text:
        choose = random.Random(seed)  # anew for each level
        for start, end in reversed(_innermost(text)):
            group = _group(text[start + 1 : end], place)
            count = choose.randint(group.least, group.most)
            text = text[:start] + group.separator.join(choose.sample(group.variants, count)) + text[end + 1 :]
    return text


def _innermost(text: str) -> list[tuple[int, int]]:
    """Positions of the two braces of each group that lies as deep as any."""
    opened: list[int] = []
    groups: list[tuple[int, int, int]] = []
    for position, character in enumerate(text):
        if character == "{":
            opened.append(position)
        elif character == "}":
            groups.append((len(opened), opened.pop(), position))
    deepest = max(depth for depth, _, _ in groups)
    return [(start, end) for depth, start, end in groups if depth == deepest]
