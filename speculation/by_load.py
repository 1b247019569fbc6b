"""Things that are told apart by load: by the power of two that the number of decoding sequences is nearest to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

_T = TypeVar("_T")
_State = TypeVar("_State")


def load_of(sequences: int) -> int:
    """The range of loads that so many decoding sequences, 0 or more, are in: 1 + round(log2(sequences)), 0 for none.

    Ranges are about the powers of two: servers and their users like these numbers, and of so many sequences one or two
    are always between two requests.
    """
    return ((2 * sequences * sequences).bit_length() + 1) // 2  # round(log2 n) = floor(log2(2 n^2) / 2)


class ByLoad(Generic[_T]):
    """One thing for each load, made when it is first asked for.

    make: of a load of several sequences at once, or of one sequence.
    """

    def __init__(self, make: Callable[[bool], _T]) -> None:
        self._make = make
        self._things: dict[int, _T] = {}

    def at(self, sequences: int) -> _T:
        return self._of(load_of(sequences))

    def _of(self, load: int) -> _T:
        if (thing := self._things.get(load)) is None:
            thing = self._things[load] = self._make(load > 1)
        return thing

    def items(self) -> list[tuple[str, _T]]:
        """With the keys of `kept`. From any thread."""
        return [(str(load), thing) for load, thing in list(self._things.items())]

    def kept(self, states: Mapping[str, _State]) -> Iterator[tuple[_T, _State]]:
        """Each thing with what was kept of it. Raises ValueError where a key is no load."""
        for load, state in states.items():
            yield self._of(int(load)), state
