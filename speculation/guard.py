"""Whether drafting keeps what it promises: drafted steps against plain ones, by the clock alone.

The choice of how much to draft rests on models of cost and gain. They can be wrong in ways that they cannot see, so
what they choose is held against plain decoding, and given up for a while where it was slower.
"""

from __future__ import annotations

_PLAIN_STEPS = 3  # plain steps that must be known before any draft
_PLAIN_MEMORY = 12.0
_DRAFTED_MEMORY = 96.0
_LEAST_STEPS, _LEAST_SEQUENCE_STEPS = 6, 64  # drafted steps before a verdict: so many and so many of each sequence
_FIRST_PAUSE, _LONGEST_PAUSE = 128, 4096  # steps


class Guard:
    """Of one load, which is a range of how many sequences decode.

    Both kinds of steps are measured as seconds a token relative to what a plain step of the moment is believed to take,
    so that the range may be wide.
    """

    def __init__(self) -> None:
        self._plain, self._plain_steps = 0.0, 0
        self._expected = self._seconds = 0.0
        self._drafted_steps = self._drafted_sequences = 0
        self._pause, self._left = _FIRST_PAUSE, 0

    @property
    def allows(self) -> bool:
        """Whether the next step may draft."""
        return self._plain_steps >= _PLAIN_STEPS and self._left == 0

    def plain(self, seconds: float, believed: float) -> None:
        """A plain step took so long, and was believed to take `believed`."""
        self._left = max(0, self._left - 1)
        self._plain_steps += 1
        self._plain += (seconds / believed - self._plain) / min(self._plain_steps, _PLAIN_MEMORY)

    def drafted(self, tokens: int, sequences: int, seconds: float, believed: float) -> None:
        """A drafted step gave `tokens` tokens; a plain step would have given `sequences` in `believed` seconds."""
        keep = 1 - 1 / _DRAFTED_MEMORY
        self._seconds = keep * self._seconds + seconds
        self._expected = keep * self._expected + tokens * believed / sequences
        self._drafted_steps += 1
        self._drafted_sequences += sequences
        if self._drafted_steps < _LEAST_STEPS or self._drafted_sequences < _LEAST_SEQUENCE_STEPS:
            return
        if self._seconds > self._plain * self._expected:
            self._left, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            self._seconds = self._expected = 0.0
            self._drafted_steps = self._drafted_sequences = 0
        elif self._drafted_steps >= _DRAFTED_MEMORY:
            self._pause = _FIRST_PAUSE
