"""Drafting is held against plain decoding by the clock."""

from __future__ import annotations

import pytest

from speculation.guard import Guard


def settled(relative: float = 1.0) -> Guard:
    """A guard that has seen plain steps of `relative` times what was believed."""
    guard = Guard()
    for _ in range(20):
        guard.plain(0.010 * relative, 0.010)
    return guard


def draft_until_refused(guard: Guard, speedup: float, steps: int) -> int:
    """How many of the steps drafted, at this many times the plain rate, with 8 sequences that gain two tokens each."""
    for step in range(steps):
        if not guard.allows:
            return step
        guard.drafted(tokens=24, sequences=8, seconds=0.030 / speedup, believed=0.010)
    return steps


def test_nothing_drafts_before_plain_steps_are_known() -> None:
    guard = Guard()
    assert not guard.allows
    for _ in range(3):
        guard.plain(0.010, 0.010)
    assert guard.allows


@pytest.mark.parametrize("speedup", [1.1, 2.0])
def test_faster_drafts_go_on(speedup: float) -> None:
    assert draft_until_refused(settled(), speedup, 1000) == 1000


def test_slower_drafts_are_given_up_soon_and_tried_again_ever_more_rarely() -> None:
    guard, drafted, plain = settled(), 0, 0
    for _ in range(20_000):
        if guard.allows:
            guard.drafted(tokens=24, sequences=8, seconds=0.030 / 0.7, believed=0.010)
            drafted += 1
        else:
            guard.plain(0.010, 0.010)
            plain += 1
    assert 10 < drafted < 0.01 * plain


def test_plain_steps_that_were_believed_too_fast_let_drafts_go_on() -> None:
    """Both kinds of steps are slower than believed: drafts that are slower than belief are still faster than plain."""
    assert draft_until_refused(settled(relative=2.0), 0.8, 1000) == 1000


def test_drafts_that_become_slow_are_given_up() -> None:
    guard = settled()
    assert draft_until_refused(guard, 1.5, 500) == 500
    assert draft_until_refused(guard, 0.5, 500) < 200
