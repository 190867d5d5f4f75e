"""Many small reads of files at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

THREADS = 4
SLICE = 128
"""Calls per task: to hand them out one by one costs more than a read from memory."""


def in_threads(call: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
    """``list(map(call, *arguments))`` in threads, for calls that wait for files. Raises what a call raises."""
    rows = list(zip(*arguments))
    parts = [rows[start : start + SLICE] for start in range(0, len(rows), SLICE)]
    if len(parts) < 2:
        return [call(*row) for row in rows]
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(lambda part: [call(*row) for row in part], parts)
        return [result for results in done for result in results]
