"""Curves of a report: bounded, and true to what was added."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.training.report.curves import Curve

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=200)


def made_of(values: list[float], limit: int) -> Curve:
    curve = Curve(limit)
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    return curve


@given(VALUES, st.integers(2, 20))
def test_thinning_keeps_the_mean_the_range_and_the_end(values, limit):
    curve = made_of(values, limit)
    finite = [value for value in values if math.isfinite(value)]
    assert len(curve.points) <= limit
    xs = [point.x for point in curve.points]
    assert xs == sorted(set(xs)) and xs[-1:] == [len(values)][: len(values)]
    assert sum(point.values for point in curve.points) == len(values)
    assert sum(point.count for point in curve.points) == len(finite)
    assert curve.not_finite == len(values) - len(finite)
    if finite:
        assert min(point.low for point in curve.points) == min(finite)
        assert max(point.high for point in curve.points) == max(finite)
        assert sum(point.total for point in curve.points) == pytest.approx(math.fsum(finite), rel=1e-9, abs=1e-3)
    for point in curve.points[:-1]:
        assert point.values == curve.stride


@given(VALUES, st.integers(2, 20), st.integers(0, 200))
def test_a_curve_from_its_document_goes_on_as_the_curve_itself(values, limit, more):
    curve = made_of(values, limit)
    copy = Curve.from_document(json.loads(json.dumps(curve.document(), allow_nan=False)), limit)
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)  # averages may cancel
    for step in range(len(values) + 1, len(values) + more % 50 + 1):
        curve.add(step, 0.5)
        copy.add(step, 0.5)
    one, two = curve.document(), copy.document()
    assert {key: one[key] for key in one if key not in ("y", "low", "high")} == {
        key: two[key] for key in two if key not in ("y", "low", "high")
    }
    for name in one.keys() & {"y", "low", "high"}:
        for a, b in zip(one[name], two[name], strict=True):
            assert (a is None and b is None) or a == pytest.approx(b, rel=1e-4, abs=1e-3 + 1e-5 * largest)


@given(VALUES, st.integers(2, 20), st.integers(0, 200))
def test_a_cut_leaves_nothing_after_it(values, limit, step):
    curve = made_of(values, limit)
    before = [point.x for point in curve.points]
    curve.cut(step)
    assert [point.x for point in curve.points] == [x for x in before if x <= step]


def test_a_place_that_is_passed_again_counts_once():
    curve = made_of([1.0, 2.0, 3.0, 4.0], 100)
    curve.add(3, 9.0)
    assert curve.document()["x"] == [1, 2, 3] and curve.document()["y"] == [1.0, 2.0, 9.0]


def test_a_short_curve_is_exact():
    values = [math.sin(step) for step in range(1000)]
    document = made_of(values, 2000).document()
    assert document["stride"] == 1 and "low" not in document
    assert document["y"] == pytest.approx(values, rel=1e-5, abs=1e-6)
