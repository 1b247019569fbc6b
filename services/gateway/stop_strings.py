"""Finding stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """One stop string and how much of it the text ends with (Knuth, Morris, Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # fallback[i]: length of the longest proper prefix of text that text[: i + 1] ends with
        self._fallback = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            length = self._extend(text[i], length)
            self._fallback[i] = length

    def advance(self, character: str) -> bool:
        """Take one more character; True when it completes the stop string."""
        self.matched = self._extend(character, self.matched)
        return self.matched == len(self.text)

    def _extend(self, character: str, length: int) -> int:
        while length and self.text[length] != character:
            length = self._fallback[length - 1]
        return length + 1 if self.text[length] == character else length


class StopStrings:
    """Passes a text on up to the first stop string, and holds back what could still become one.

    The stop string that is complete first wins, the longest of several that end together: the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now; `stopped` tells whether a stop string is complete. No push after that."""
        if not self._patterns:
            return text
        text = self._held + text
        for position in range(len(self._held), len(text)):
            complete = [pattern for pattern in self._patterns if pattern.advance(text[position])]
            if complete:
                self.stopped = True
                self._held = ""
                return text[: position + 1 - max(len(pattern.text) for pattern in complete)]
        shown = len(text) - max(pattern.matched for pattern in self._patterns)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, once the text is over without a stop string."""
        held, self._held = self._held, ""
        return held
