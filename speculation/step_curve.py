"""How long a step of the LLM takes by the number of its rows. Knows neither the model nor the clock."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

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
        self._rows = np.array(sorted(points), dtype=np.float64)
        self._seconds = np.array([points[rows] for rows in sorted(points)], dtype=np.float64)
        self._measured = np.zeros(len(points))
        self._table = np.zeros(0)

    @property
    def points(self) -> dict[int, float]:
        """The points as they are believed now, never falling."""
        return dict(zip(map(int, self._rows), np.maximum.accumulate(self._seconds).tolist(), strict=True))

    def table(self, rows: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """float64 [at least rows + 1]: seconds of a step of each number of rows; that of 0 is that of 1."""
        if len(self._table) <= rows:
            self._tabulate(max(rows, 2 * len(self._table), int(self._rows[-1])))
        return self._table

    def seconds(self, rows: int) -> float:
        return float(self.table(rows)[rows])

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a measured step: its neighbours move towards it, all larger ones a little.

        Smaller ones stay: what a step with drafts costs beyond expectation is no reason to think worse of one without.
        """
        expected = self.seconds(rows)
        surprise = np.log(np.clip(seconds / expected, 1 / _MOST_SURPRISE, _MOST_SURPRISE))
        place = float(np.interp(rows, self._rows, np.arange(len(self._rows))))
        nearness = np.clip(1 - np.abs(np.arange(len(self._rows)) - place), 0, 1)
        rate = np.maximum(_RATE, 1 / (_FIRST + self._measured))
        share = np.where(self._rows > rows, np.maximum(nearness, _BEHIND), nearness)
        self._seconds *= np.exp(rate * surprise * share)
        self._measured += nearness
        self._tabulate(len(self._table) - 1)

    def _tabulate(self, rows: int) -> None:
        """The last two points give the slope behind them; a single point stands for any number of rows."""
        seconds = np.maximum.accumulate(self._seconds)
        at = np.arange(rows + 1)
        self._table = np.interp(at, self._rows, seconds)
        if len(seconds) > 1:
            slope = (seconds[-1] - seconds[-2]) / (self._rows[-1] - self._rows[-2])
            self._table += slope * np.maximum(0, at - self._rows[-1])
