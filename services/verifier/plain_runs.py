"""When steps do without drafts for a while, to see what drafting gains."""

from __future__ import annotations

from dataclasses import dataclass

from speculation.by_load import ByLoad
from speculation.guard import Guard

# Drafted steps at a load before a run: fewer while plain steps in a row are not known there or drafting is accused of
# losing, and where the gain is so small that a machine of changing speed can hide its end; there it costs little.
_EVERY, _OFTEN, _SOON = 2048, 512, 64
_SMALL_GAIN = 1.3
# The first steps of a run tell nothing: while it drafted, the LLM's weights went from the last cache, and they come
# back in some twenty steps (from 6.0 ms to 3.9 with 8 streams).
_STEPS, WARMING = 28, 20
# Loads that end before their runs do are asked less and less often.
_MOST_DOUBLINGS = 5


@dataclass
class _Load:
    drafted: int = 0  # steps since the last run
    in_vain: int = 0  # runs that left open what they were for


class PlainRuns:
    """Runs of plain steps at one load each; a run ends with its load.

    in_a_row: plain steps since the last one that drafted, whatever their load.
    """

    def __init__(self) -> None:
        self.in_a_row = WARMING
        self._loads = ByLoad(lambda many: _Load())
        self._running: _Load | None = None
        self._left = 0

    def goes_on(self, sequences: int) -> bool:
        """Whether a run is under way in this step of so many sequences."""
        if self._left == 0 or self._loads.at(sequences) is not self._running:
            self._left = 0
            return False
        self._left -= 1
        return True

    def begins(self, sequences: int, guards: list[Guard], guard: Guard) -> bool:
        """Whether a run begins with this step, which would draft. guards: of its load; guard: of how it would draft."""
        load = self._loads.at(sequences)
        urgent = not guard.knows_a_row or any(each.accused for each in guards)
        if not urgent:
            load.in_vain = 0
        every = _SOON << load.in_vain if urgent else _OFTEN if guard.gain < _SMALL_GAIN else _EVERY
        if load.drafted < every:
            return False
        load.drafted, load.in_vain = 0, min(load.in_vain + urgent, _MOST_DOUBLINGS)
        self._running, self._left = load, _STEPS - 1
        return True

    def drafts(self, sequences: int) -> None:
        """This step drafts."""
        self.in_a_row = 0
        self._loads.at(sequences).drafted += 1
