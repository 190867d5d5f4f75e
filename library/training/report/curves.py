"""Curves of bounded size: a long run's values are kept as means of equally many neighbours, with their range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 2000


@dataclass
class Point:
    """Neighbouring values of a curve as one."""

    x: int
    """Where the last of them stands."""
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    """How many finite values are in it."""
    values: int = 0
    """How many values are in it, finite or not."""

    @property
    def mean(self) -> float | None:
        """The mean of the finite values; None when there is none."""
        return self.total / self.count if self.count else None

    def add(self, other: Point) -> None:
        """Take in the point that follows this one."""
        self.x = other.x
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count
        self.values += other.values


class Curve:
    """A value over the steps of a run; at most ``limit`` points (at least 2), however many values are added.

    Every point but the last holds ``stride`` values. When the limit is passed, neighbours become one and the stride
    doubles. Values that are not finite are counted and left out of the means.
    """

    def __init__(self, limit: int = MOST_POINTS) -> None:
        self.limit = limit
        self.stride = 1
        self.points: list[Point] = []
        self.not_finite = 0
        self.first_not_finite: int | None = None

    def add(self, x: int, value: float) -> None:
        """Add the value at ``x``. What was known from ``x`` on is forgotten: a run passes each place once."""
        if self.points and x <= self.points[-1].x:
            self.cut(x - 1)
        if math.isfinite(value):
            point = Point(x, value, value, value, 1, 1)
        else:
            point = Point(x, values=1)
            self.not_finite += 1
            self.first_not_finite = x if self.first_not_finite is None else self.first_not_finite
        if self.points and self.points[-1].values < self.stride:
            self.points[-1].add(point)
        else:
            self.points.append(point)
        if len(self.points) > self.limit:
            self._halve()

    def _halve(self) -> None:
        merged = self.points[::2]
        for point, following in zip(merged, self.points[1::2]):
            point.add(following)
        self.points = merged
        self.stride *= 2

    def cut(self, x: int) -> None:
        """Forget everything after ``x``; a point of several values goes as a whole."""
        self.points = [point for point in self.points if point.x <= x]
        if self.first_not_finite is not None and self.first_not_finite > x:
            self.not_finite, self.first_not_finite = 0, None

    def document(self) -> dict[str, Any]:
        """JSON-able columns: ``x``, ``y`` (means, null for none), and for points of several values low, high and n."""
        points = self.points
        found: dict[str, Any] = {
            "stride": self.stride,
            "x": [p.x for p in points],
            "y": [_short(p.mean) for p in points],
        }
        if self.stride > 1:
            found["low"] = [_short(p.low) if p.count else None for p in points]
            found["high"] = [_short(p.high) if p.count else None for p in points]
            found["n"] = [p.count for p in points]
            found["values"] = [p.values for p in points]
        if self.not_finite:
            found["not_finite"], found["first_not_finite"] = self.not_finite, self.first_not_finite
        return found

    @classmethod
    def from_document(cls, document: Mapping[str, Any], limit: int = MOST_POINTS) -> Curve:
        """The curve that ``document`` describes. Raises KeyError, TypeError or ValueError when it describes none."""
        curve = cls(limit)
        curve.stride = int(document["stride"])
        xs, ys = document["x"], document["y"]
        lows, highs = document.get("low", ys), document.get("high", ys)
        counts = document.get("n", [int(y is not None) for y in ys])
        values = document.get("values", [1] * len(xs))
        for x, y, low, high, count, number in zip(xs, ys, lows, highs, counts, values, strict=True):
            point = Point(int(x), values=int(number))
            if y is not None:
                point.total, point.low, point.high, point.count = y * count, float(low), float(high), int(count)
            curve.points.append(point)
        curve.not_finite = int(document.get("not_finite", 0))
        curve.first_not_finite = document.get("first_not_finite")
        return curve


def _short(value: float | None) -> float | None:
    """Six digits: more than a chart can show."""
    return None if value is None else float(f"{value:.6g}")
