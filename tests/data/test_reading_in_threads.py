"""Many small reads: results come in order, errors come through, and slow ones do not wait for each other."""

from __future__ import annotations

import threading
import time

import pytest

from library.data.threads import SLICE, in_threads


@pytest.mark.parametrize("count", [0, 1, 17, 3 * SLICE + 5])
@pytest.mark.parametrize("seconds", [0.0, 0.0003])
def test_results_are_those_of_map(count, seconds):
    def call(first: int, second: str) -> str:
        time.sleep(seconds)
        return f"{first}{second}"

    arguments = range(count), [chr(65 + number % 26) for number in range(count)]
    assert in_threads(call, *arguments) == list(map(call, *arguments))


def test_slow_calls_are_made_beside_each_other():
    places: list[int] = []

    def call(_: int) -> None:
        time.sleep(0.001)
        places.append(threading.get_ident())

    in_threads(call, range(5 * SLICE))
    assert len(set(places) - {threading.get_ident()}) > 1


@pytest.mark.parametrize("at", [3, 4 * SLICE])
def test_what_a_call_raises_comes_through(at):
    def call(number: int) -> None:
        time.sleep(0.0003)
        if number == at:
            raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        in_threads(call, range(5 * SLICE))
