"""How long a step of the LLM takes by the number of its rows. Knows neither the model nor the clock."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_RATE = 0.05  # share of a surprise that is believed, and more of the first ones:
_FIRST = 5.0  # the n-th measurement at a point counts 1 / (_FIRST + n)
_BEHIND = 0.1  # of that, the share that larger row counts believe too
_MOST_SURPRISE = 3.0  # factor beyond which a measurement counts as a disturbance of this size


class StepCurve:
    """Seconds of a step by rows: linear between the measured points, never falling, going on as its last piece does.

    points: seconds by rows, at least one, all above 0.

    Raises:
        ValueError: there is no point, or one is not positive.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points or not all(rows > 0 and 0 < seconds < float("inf") for rows, seconds in points.items()):
            raise ValueError(f"a curve needs points of positive rows and seconds, got {dict(points)}")
        self._rows = sorted(points)
        self._seconds = [points[rows] for rows in self._rows]
        self._measured = [0.0] * len(points)
        self._rising = list(accumulate(self._seconds, max))
        self._table = np.empty(0)  # empty: to be made again

    @property
    def points(self) -> dict[int, float]:
        """The points as they are believed now, never falling."""
        return dict(zip(self._rows, self._rising, strict=True))

    def table(self, rows: int) -> Floats:
        """float64 [at least rows + 1], seconds of a step by its rows; that of 0 is that of 1."""
        if len(self._table) <= rows:
            self._tabulate(max(rows, self._rows[-1]))
        return self._table

    def seconds(self, rows: int) -> float:
        last = len(self._rows) - 1
        upper = min(max(1, bisect_left(self._rows, rows)), last)
        if last == 0 or rows <= self._rows[0]:
            return self._rising[0]
        left, right = self._rows[upper - 1], self._rows[upper]
        below, above = self._rising[upper - 1], self._rising[upper]
        return below + (above - below) * (rows - left) / (right - left)

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a measured step: its neighbours move towards it, all larger ones a little.

        Smaller ones stay: what a step with drafts costs beyond expectation is no reason to think worse of one without.
        """
        surprise = math.log(min(max(seconds / self.seconds(rows), 1 / _MOST_SURPRISE), _MOST_SURPRISE))
        upper = bisect_left(self._rows, rows)  # the first point at or behind it
        for point in range(max(0, upper - 1), len(self._rows)):
            nearness = self._nearness(point, upper, rows)
            share = max(nearness, _BEHIND) if self._rows[point] > rows else nearness
            rate = max(_RATE, 1 / (_FIRST + self._measured[point]))
            self._seconds[point] *= math.exp(rate * surprise * share)
            self._measured[point] += nearness
        self._rising = list(accumulate(self._seconds, max))
        self._table = np.empty(0)

    def _nearness(self, point: int, upper: int, rows: int) -> float:
        """1 at a point, falling linearly to 0 at the next ones; all to the last point behind it."""
        if upper == len(self._rows):
            return float(point == upper - 1)
        if point > upper:
            return 0.0
        if upper == 0:
            return 1.0
        left, right = self._rows[upper - 1], self._rows[upper]
        place = (rows - left) / (right - left)
        return place if point == upper else 1 - place

    def _tabulate(self, rows: int) -> None:
        """The last two points give the slope behind them; a single point stands for any number of rows."""
        at = np.arange(rows + 1)
        table = np.interp(at, self._rows, self._rising)
        if len(self._rows) > 1:
            slope = (self._rising[-1] - self._rising[-2]) / (self._rows[-1] - self._rows[-2])
            table += slope * np.maximum(0, at - self._rows[-1])
        self._table = table
