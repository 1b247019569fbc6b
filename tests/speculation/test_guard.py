"""Drafting is held against plain decoding by the clock."""

from __future__ import annotations

import json

import pytest

from speculation.guard import Guard, Guards


def settled(relative: float = 1.0) -> Guard:
    """A guard that has seen plain steps of `relative` times the yardstick."""
    guard = Guard(hopeful=True)
    for _ in range(20):
        guard.plain(0.010 * relative, 0.010, in_a_row=True)
    return guard


def draft(guard: Guard, speedup: float, promised: float | None = None) -> None:
    """A step of 8 sequences that gain two tokens each, at this many times the plain rate, as promised if not given."""
    guard.drafted(24, 24.0, 8, seconds=0.030 / speedup, yardstick=0.010, promised=promised or speedup)


def draft_until_refused(guard: Guard, speedup: float, steps: int) -> int:
    """How many of the steps drafted."""
    for step in range(steps):
        if not guard.ready:
            return step
        draft(guard, speedup)
    return steps


def lost(guard: Guard, speedup: float, steps: int) -> float:
    """Share of the time of so many plain steps' tokens that is lost where drafting has this speed-up."""
    seconds = tokens = 0.0
    for _ in range(steps):
        if guard.ready:
            draft(guard, speedup)
            seconds, tokens = seconds + 3 / speedup, tokens + 3
        else:
            guard.plain(0.010, 0.010, in_a_row=True)
            seconds, tokens = seconds + 1, tokens + 1
    return 1 - tokens / seconds


def test_nothing_drafts_before_plain_steps_are_known() -> None:
    guard = Guard(hopeful=True)
    assert not guard.ready
    for _ in range(8):
        guard.plain(0.010, 0.010, in_a_row=True)
    assert guard.ready


def test_plain_steps_in_a_row_replace_those_between_drafted_ones() -> None:
    guard = Guard(hopeful=True)
    for _ in range(20):
        guard.plain(0.013, 0.010, in_a_row=False)
    assert guard.ready, "better than nothing"
    assert not guard.knows_a_row
    for _ in range(8):
        guard.plain(0.010, 0.010, in_a_row=True)
    for _ in range(20):
        guard.plain(0.013, 0.010, in_a_row=False)
    assert guard.ready
    assert guard.knows_a_row
    draft_until_refused(guard, 1.1, 64)
    assert guard.gain == pytest.approx(1.1)


@pytest.mark.parametrize("speedup", [1.05, 2.0])
def test_faster_drafts_go_on(speedup: float) -> None:
    assert draft_until_refused(settled(), speedup, 1000) == 1000


def test_clearly_slower_drafts_are_given_up_after_a_few_steps_and_sooner_the_next_time() -> None:
    for speedup, first, second in ((0.7, 3, 2), (0.9, 10, 5)):
        guard = settled()
        assert draft_until_refused(guard, speedup, 100) <= first
        while not guard.ready:
            guard.plain(0.010, 0.010, in_a_row=True)
        assert draft_until_refused(guard, speedup, 100) <= second


def test_of_many_sequences_more_is_hoped_for_in_the_first_steps_of_a_trial() -> None:
    guards = Guards(ways=1)
    (one,), (many,) = guards.at(1), guards.at(8)
    assert one.hope == 1 < many.hope
    for _ in range(20):
        many.plain(0.010, 0.010, in_a_row=True)
    assert draft_until_refused(many, 1.5, 64) == 64
    assert many.hope == 1
    assert one.gain == 1
    assert many.gain == pytest.approx(1.5)


def test_drafting_that_gains_more_than_was_promised_is_hoped_to_go_on() -> None:
    guard = settled()
    draft_until_refused(guard, 1.2, 64)
    assert guard.hope == pytest.approx(1)
    for promised, hope in ((1.0, 1.2), (1.5, 1.0), (0.6, 1.5)):
        for _ in range(100):
            draft(guard, 1.2, promised)
        assert guard.hope == pytest.approx(hope, rel=0.01), "not less than promised, and not without bounds"


def test_slightly_slower_drafts_are_given_up_in_the_long_run() -> None:
    guard = settled()
    draft_until_refused(guard, 2.0, 20)  # what was gained at first does not hide it
    assert draft_until_refused(guard, 0.97, 1000) < 100


@pytest.mark.parametrize("speedup", [0.3, 0.7, 0.9, 0.98])
def test_trials_lose_a_small_share_of_the_time_and_ever_less(speedup: float) -> None:
    guard = settled()
    assert lost(guard, speedup, 1000) < 0.025
    assert lost(guard, speedup, 20_000) < 0.005


def test_a_yardstick_that_is_wrong_lets_drafts_go_on() -> None:
    """Both kinds of steps take twice as long: drafts that lose by the yardstick still gain by the clock."""
    assert draft_until_refused(settled(relative=2.0), 0.8, 1000) == 1000


def test_drafts_that_become_slow_are_given_up() -> None:
    guard = settled()
    assert draft_until_refused(guard, 1.5, 500) == 500
    assert draft_until_refused(guard, 0.5, 500) < 10


@pytest.mark.parametrize(("speedup", "goes_on"), [(1.2, True), (0.9, False)])
def test_a_machine_that_becomes_slower_is_told_from_drafts_that_do(speedup: float, goes_on: bool) -> None:
    guard = settled()
    draft_until_refused(guard, speedup=1.5, steps=20)
    assert draft_until_refused(guard, speedup / 1.6, 100) < 100, "by what is known of plain steps, they lose"
    for _ in range(3):  # a drafter that does lose is heard again at most
        for _ in range(8):
            guard.plain(0.016, 0.010, in_a_row=True)
        draft_until_refused(guard, speedup / 1.6, 50)
    assert guard.ready is goes_on


def test_an_unlucky_step_behind_an_acquittal_is_no_reason_to_accuse_again() -> None:
    guard = settled()
    draft_until_refused(guard, speedup=1.5, steps=100)
    assert draft_until_refused(guard, speedup=1.2 / 1.6, steps=100) < 100
    for _ in range(8):
        guard.plain(0.016, 0.010, in_a_row=True)
    assert guard.ready
    guard.drafted(tokens=8, expected=24.0, sequences=8, seconds=0.030 * 1.6 / 1.2, yardstick=0.010, promised=1.2)
    assert guard.ready


def test_a_pause_ends_while_another_way_drafts() -> None:
    guard = settled()
    draft_until_refused(guard, 0.5, 100)
    for _ in range(8):
        guard.plain(0.010, 0.010, in_a_row=True)
    assert not guard.ready
    for _ in range(2000):
        guard.passed()
    assert guard.ready


def test_bad_luck_with_the_first_trees_is_no_reason_to_stop() -> None:
    """One sequence, whose first trees bring nothing, at twice the cost of a plain step."""
    guard = settled()
    for _ in range(3):
        guard.drafted(tokens=1, expected=3.5, sequences=1, seconds=0.020, yardstick=0.010, promised=1.75)
    assert guard.ready


def test_each_load_and_way_has_its_own_verdict() -> None:
    guards = Guards(ways=2)
    for sequences in (4, 16):
        for guard in guards.at(sequences):
            for _ in range(20):
                guard.plain(0.010, 0.010, in_a_row=True)
    while guards.at(4)[0].ready:
        draft(guards.at(4)[0], 0.5)
    assert not guards.allow(4, 0, gain=1.5, begins=False)
    assert guards.allow(4, 1, gain=1.1, begins=False), "another way to draft"
    assert guards.allow(16, 0, gain=1.1, begins=False)
    assert not guards.allow(16, 0, gain=1.01, begins=False), "within what the estimates are wrong by"
    assert guards.allow(16, 0, gain=1.055, begins=False)
    assert not guards.allow(16, 0, gain=1.055, begins=True), "less than slower steps behind a short trial take"


def test_verdicts_are_kept_and_doubted_sooner() -> None:
    guards, kept = Guards(ways=1), Guards(ways=1)
    for sequences, speedup in ((1, 2.0), (8, 0.5)):
        for _ in range(20):
            guards.at(sequences)[0].plain(0.012, 0.010, in_a_row=True)
        draft_until_refused(guards.at(sequences)[0], speedup, 100)
    kept.restore(json.loads(json.dumps(guards.state())), share=0.25)
    assert kept.allow(1, 0, gain=1.5, begins=False)
    assert not kept.allow(8, 0, gain=1.5, begins=False)
    assert kept.at(1)[0].informed, "plain steps are known"
    assert kept.at(1)[0].knows_a_row
    assert kept.at(1)[0].steps == 64, "the trial is not begun again"

    def pause(guard: Guard) -> int:
        steps = 0
        while not guard.ready:
            guard.plain(0.012, 0.010, in_a_row=True)
            steps += 1
        return steps

    assert pause(kept.at(8)[0]) < pause(guards.at(8)[0]) / 3
    with pytest.raises(ValueError, match="unpack"):
        kept.restore({"1": [[1.0]]}, share=0.25)
