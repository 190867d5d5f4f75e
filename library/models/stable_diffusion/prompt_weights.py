"""The grammar of weighted prompts: ``a (red:1.3) cat, ((bright)) [noisy]``.

``(text)`` multiplies the weight of its text by 1.1, ``[text]`` divides it by 1.1, ``(text:1.3)`` multiplies it by the
number; brackets nest. ``\\(``, ``\\)``, ``\\[``, ``\\]`` and ``\\\\`` stand for the characters themselves. A closing
bracket without an opening one is text, and an opening one without a closing one reaches to the end. The format is that
of AUTOMATIC1111's web UI, as kohya-ss/sd-scripts reads it.

Texts of images know two words more: ``BREAK`` lets the text go on in the next chunk of tokens, and ``AND`` divides a
prompt into sub-prompts.
"""

from __future__ import annotations

import re
from itertools import groupby

from library.errors import UserError

BREAK = re.compile(r"\bBREAK\b")
AND = " AND "
LARGEST_WEIGHT = 1000
"""Beyond it, what a text encoder gives leaves the range of fp16."""
FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING = {")": "(", "]": "["}
PIECE = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
    |(?P<lone>\\)
    |:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))(?P<end>\))
    |(?P<bracket>[()\[\]])
    |[^\\()\[\]:]+
    |:""",
    re.VERBOSE,
)


def parse_prompt_weights(prompt: str) -> list[tuple[str, float]]:
    """The pieces of ``prompt`` with their weights, brackets and escapes taken away, neighbours of one weight joined.

    An empty prompt is one empty piece of weight 1.
    """
    texts: list[str] = []
    weights: list[float] = []
    starts: dict[str, list[int]] = {"(": [], "[": []}

    def multiply_from(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in PIECE.finditer(prompt):
        bracket = match["bracket"] or match["end"]
        opening = OPENING.get(bracket or "")
        if match["lone"]:
            continue
        if bracket in starts:
            starts[bracket].append(len(texts))
        elif opening and starts[opening]:
            multiply_from(starts[opening].pop(), float(match["number"] or FACTORS[opening]))
        else:
            texts.append(match["escaped"] or match[0])
            weights.append(1.0)
    for opening, unclosed in starts.items():
        for start in unclosed:
            multiply_from(start, FACTORS[opening])
    return _joined(texts, weights) or [("", 1.0)]


def require_usable_weights(prompt: str, place: str = "") -> None:
    """Raise UserError, beginning with ``place``, for a weight that is so large that numbers overflow."""
    for text, weight in parse_prompt_weights(prompt):
        if not abs(weight) <= LARGEST_WEIGHT:
            words = text.strip()[:40]
            raise UserError(
                f'{place}the weight of "{words}" must be between -{LARGEST_WEIGHT} and {LARGEST_WEIGHT}, '
                f"not {weight:g}."
            )


def sub_prompts(prompt: str) -> list[str]:
    """The parts of ``prompt`` between words ``AND``, in capitals with a space on each side; one where there is none."""
    return [part.strip() for part in prompt.split(AND)]


def parts_between_breaks(prompt: str) -> list[list[tuple[str, float]]]:
    """The pieces of ``prompt`` with their weights, as ``parse_prompt_weights`` gives them, of each part of it.

    The word ``BREAK``, in capitals, divides the parts; brackets may reach over it.
    """
    parts: list[list[tuple[str, float]]] = [[]]
    for text, weight in parse_prompt_weights(prompt):
        first, *others = BREAK.split(text)
        parts[-1].append((first, weight))
        parts += [[(other, weight)] for other in others]
    return parts


def _joined(texts: list[str], weights: list[float]) -> list[tuple[str, float]]:
    runs = groupby(zip(texts, weights), key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]
