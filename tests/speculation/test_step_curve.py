from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.step_curve import StepCurve

Points = dict[int, float]
points = st.dictionaries(st.integers(1, 300), st.floats(1e-5, 10), min_size=1, max_size=8)


@given(points, st.lists(st.tuples(st.integers(1, 600), st.floats(1e-6, 100)), max_size=20))
def test_never_falls_and_stays_positive_whatever_is_measured(start: Points, steps: list[tuple[int, float]]) -> None:
    curve = StepCurve(start)
    for rows, seconds in steps:
        curve.observe(rows, seconds)
    table = curve.table(600)
    assert len(table) > 600
    assert min(table) > 0
    assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(table))
    within = range(max(start) + 1)
    assert [curve.seconds(rows) for rows in within] == pytest.approx([table[rows] for rows in within])


@given(points)
def test_rising_points_are_met(start: Points) -> None:
    rising = dict(zip(sorted(start), sorted(start.values()), strict=True))
    curve = StepCurve(rising)
    assert curve.points == pytest.approx(rising)
    assert [curve.seconds(rows) for rows in rising] == pytest.approx(list(rising.values()))


def test_lines_between_and_behind_the_points() -> None:
    curve = StepCurve({1: 1.0, 5: 3.0, 9: 4.0})
    assert [curve.seconds(rows) for rows in (0, 1, 3, 5, 7, 9, 13)] == pytest.approx([1, 1, 2, 3, 3.5, 4, 5])
    assert StepCurve({4: 2.0}).seconds(100) == 2.0


def test_measurements_move_their_neighbours_most_and_win_in_the_end() -> None:
    curve = StepCurve({1: 1.0, 4: 2.0, 16: 3.0, 64: 4.0})
    curve.observe(4, 2.5)
    moved = curve.points
    assert moved[4] - 2.0 > 4 * (moved[16] / 3.0 - 1) > 0
    draw = random.Random(0)
    for _ in range(1000):
        rows = draw.choice([1, 4, 16, 64])
        curve.observe(rows, 0.01 * rows * draw.lognormvariate(0, 0.1))
    assert curve.points == pytest.approx({rows: 0.01 * rows for rows in (1, 4, 16, 64)}, rel=0.15)


def test_a_single_disturbance_moves_little() -> None:
    curve = StepCurve({1: 1.0, 8: 2.0})
    for _ in range(100):
        curve.observe(8, 2.0)
    curve.observe(8, 1000.0)
    assert curve.seconds(8) < 2.2


@pytest.mark.parametrize("wrong", [{}, {1: 0.0}, {0: 1.0}, {1: float("nan")}, {1: float("inf")}])
def test_points_that_are_no_times(wrong: Points) -> None:
    with pytest.raises(ValueError, match="positive rows and seconds"):
        StepCurve(wrong)
