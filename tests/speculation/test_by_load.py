"""Ranges of load."""

from __future__ import annotations

import math

import pytest

from speculation.by_load import ByLoad, load_of


def test_a_load_is_of_what_is_nearest_to_its_power_of_two() -> None:
    assert load_of(0) == 0
    assert all(load_of(count) == 1 + round(math.log2(count)) for count in range(1, 3000))


@pytest.mark.parametrize("streams", [4, 8, 16, 32, 64])
def test_streams_of_which_one_has_just_ended_are_of_the_same_load(streams: int) -> None:
    assert load_of(streams - 1) == load_of(streams) == load_of(streams + 1)


def test_one_thing_for_each_load() -> None:
    things: ByLoad[list[bool]] = ByLoad(lambda many: [many])
    assert things.at(7) is things.at(8) is not things.at(4)
    assert things.at(1) == [False]
    assert things.at(2) == [True]
    again: ByLoad[list[bool]] = ByLoad(lambda many: [many])
    kept = dict(things.items())
    assert len(kept) == 4
    assert all(thing == state for thing, state in again.kept(kept))
    with pytest.raises(ValueError, match="many"):
        list(again.kept({"many": [True]}))
