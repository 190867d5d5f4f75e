"""Many small reads of files at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

THREADS = 4
SLICE = 128
"""Calls per task: to hand them out one by one costs more than a read from memory."""
TRIAL = 16
"""Calls before it is first looked at how long they take."""
QUICK = 0.0002
"""Seconds per call up to which threads cost more than they save: the files are in memory already."""


def in_threads(call: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
    """``list(map(call, *arguments))``, in threads as soon as calls take long, as reads of files may.

    Raises what a call raises.
    """
    rows = list(zip(*arguments))
    results: list[T] = []
    quick, size = True, TRIAL
    while quick and len(results) < len(rows):
        part, started = rows[len(results) : len(results) + size], time.perf_counter()
        results += [call(*row) for row in part]
        quick, size = time.perf_counter() - started <= QUICK * len(part), SLICE
    rest = rows[len(results) :]
    if rest:
        parts = [rest[start : start + SLICE] for start in range(0, len(rest), SLICE)]
        with ThreadPoolExecutor(THREADS) as pool:
            for done in pool.map(lambda part: [call(*row) for row in part], parts):
                results += done
    return results
