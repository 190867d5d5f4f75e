"""A warning when steps become far slower on a full device, once, and at no other time."""

from __future__ import annotations

import itertools

import pytest

from library.training.spilling import WINDOW, SpillWatch


def warnings_of(seconds: list[float], used: float) -> list[str]:
    moments = itertools.accumulate([0.0, *seconds])
    watch = SpillWatch(lambda: used, moments.__next__)
    return [warning for warning in (watch.step() for _ in range(len(seconds) + 1)) if warning]


SLOW_AFTER_A_WHILE = [1.0] * 3 * WINDOW + [4.0] * 4 * WINDOW


def test_slow_steps_on_a_full_device_are_named_once():
    found = warnings_of(SLOW_AFTER_A_WHILE, 0.99)
    assert len(found) == 1 and "takes 4.0 s, where it took 1.0 s" in found[0]


@pytest.mark.parametrize(
    ("seconds", "used"),
    [
        (SLOW_AFTER_A_WHILE, 0.5),  # there is room: something else is slow
        ([1.0] * 3 * WINDOW + [2.5] * 3 * WINDOW, 0.99),
        (([1.0] * (WINDOW - 1) + [90.0]) * 5, 0.99),  # sample images now and then
        ([4.0] * 3 * WINDOW, 0.99),  # always as slow
        ([1.0], 0.99),
    ],
)
def test_other_runs_are_left_alone(seconds, used):
    assert warnings_of(seconds, used) == []
