"""Runs of plain steps: when they begin, and that they end with their load."""

from __future__ import annotations

from services.verifier.plain_runs import PlainRuns
from speculation.guard import Guard


def guard(*, knows_a_row: bool, gain: float = 1.1) -> Guard:
    guard = Guard(hopeful=True)
    for _ in range(8):
        guard.plain(0.010, 0.010, in_a_row=knows_a_row)
    for _ in range(32):
        guard.drafted(24, 24.0, 8, seconds=0.030 / gain, yardstick=0.010, promised=gain)
    return guard


def drafts_before_a_run(runs: PlainRuns, sequences: int, own: Guard, *others: Guard) -> int:
    for drafted in range(5000):
        if runs.begins(sequences, [own, *others], own):
            return drafted
        runs.drafts(sequences)
    raise AssertionError("no run")


def length(runs: PlainRuns, sequences: int) -> int:
    """Steps of a run that go on with so many sequences, behind its first."""
    steps = 0
    while runs.goes_on(sequences):
        steps += 1
    return steps


def test_runs_are_rare_and_rarer_where_drafting_gains_much() -> None:
    known = guard(knows_a_row=True)
    assert drafts_before_a_run(PlainRuns(), 8, known) == 512
    assert drafts_before_a_run(PlainRuns(), 8, guard(knows_a_row=True, gain=1.6)) == 2048
    runs = PlainRuns()
    assert [drafts_before_a_run(runs, 8, known) for _ in range(3)] == [512] * 3
    assert drafts_before_a_run(PlainRuns(), 8, guard(knows_a_row=False)) == 64


def test_an_accused_way_is_heard_soon_though_another_one_drafts() -> None:
    known, accused = guard(knows_a_row=True), guard(knows_a_row=True)
    while not accused.accused:
        accused.drafted(24, 24.0, 8, seconds=0.090, yardstick=0.010, promised=1.0)
    assert drafts_before_a_run(PlainRuns(), 8, known, accused) == 64


def test_a_run_ends_with_its_load() -> None:
    runs, known = PlainRuns(), guard(knows_a_row=True)
    drafts_before_a_run(runs, 8, known)
    assert runs.goes_on(8)
    assert runs.goes_on(9), "the same range of loads"
    assert not runs.goes_on(4)
    assert not runs.goes_on(8), "it is over"
    drafts_before_a_run(runs, 8, known)
    assert length(runs, 8) == 27


def test_runs_that_tell_nothing_become_rare() -> None:
    runs, unknown = PlainRuns(), guard(knows_a_row=False)
    assert [drafts_before_a_run(runs, 8, unknown) for _ in range(7)] == [64, 128, 256, 512, 1024, 2048, 2048]
    assert drafts_before_a_run(runs, 2, unknown) == 64, "each load for itself"
    drafts_before_a_run(runs, 8, guard(knows_a_row=True))
    assert drafts_before_a_run(runs, 8, unknown) == 64, "after one that told something"


def test_plain_steps_are_counted_over_all_loads() -> None:
    runs = PlainRuns()
    runs.in_a_row += 5
    runs.drafts(8)
    assert runs.in_a_row == 0
