"""Where the end of a text has occurred before, and what followed it there.

The data structure is that of LZ77 compressors: one array of tokens, a hash table from the last n tokens to the newest
position behind them, and links from each position to the one before it with the same n tokens. A suffix tree or trie
(SuffixDecoding, Oliaro et al., 2024) finds the longest match without search, but takes an object for each of its nodes
and, in a trie, a path of max_match nodes for each token; here a token costs two table entries and 20 bytes of arrays,
is added in constant time, and, the oldest being first in all chains, removed in constant time too.

Two lengths of n-grams are hashed: long ones, so that a long match is found among many short ones, and short ones for
when there is none.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

MIN_MATCH = 2
LONG_MATCH = 5
MAX_MATCH = 16
MAX_OCCURRENCES = 32
# Stands between texts. No token has this id, so that no match goes over the end of a text.
SEPARATOR = 2**32 - 1

_SHORT = (1 << 32 * MIN_MATCH) - 1
_LONG = (1 << 32 * LONG_MATCH) - 1


@dataclass(frozen=True)
class Occurrences:
    """Earlier occurrences of the longest suffix that has any.

    positions: where each goes on, the newest first. length: tokens of the suffix, at most MAX_MATCH; 0 for no match.
    """

    positions: tuple[int, ...] = ()
    length: int = 0


NO_OCCURRENCES = Occurrences()


class SuffixIndex:
    """An index over texts that grows at its end and, with a capacity, forgets at its beginning.

    capacity: most tokens kept, None for all; the oldest are removed first. A position is a token's number, counted from
    the first that was ever added; what was removed is not found any more.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1")
        self._capacity = capacity
        # The arrays hold the positions from _first on. What is before _start is removed, and cut off now and then.
        self._first = self._start = 0
        self._tokens = array("I")
        # At position p: the last position before p that has the same n tokens in front of it, or -1.
        self._short_links = array("q")
        self._long_links = array("q")
        self._short_heads: dict[int, int] = {}
        self._long_heads: dict[int, int] = {}
        # The LONG_MATCH tokens before the end and before _start as one number, 32 bits each.
        self._key = self._oldest_key = _LONG

    def __len__(self) -> int:
        """Tokens kept, with a separator for each text."""
        return self._first + len(self._tokens) - self._start

    @property
    def entries(self) -> int:
        """Entries of the hash tables; at most two for each token kept."""
        return len(self._short_heads) + len(self._long_heads)

    def add_text(self, token_ids: Sequence[int], context: int = 0) -> None:
        """Add a text apart from those before it. Its first `context` tokens are matched, but never what follows."""
        self._append(SEPARATOR, False)
        for token_id in token_ids[:context]:
            self._append(token_id, False)
        self.extend(token_ids[context:])

    def extend(self, token_ids: Sequence[int]) -> None:
        """Go on with the text that was added last."""
        for token_id in token_ids:
            self._append(token_id, True)
        if self._capacity is not None:
            self._remove(len(self) - self._capacity)

    def find(self, tail: Sequence[int]) -> Occurrences:
        """The newest MAX_OCCURRENCES at most of the longest suffix of `tail`, if it has MIN_MATCH tokens."""
        tail = tail[-MAX_MATCH:]
        key = _LONG
        for token_id in tail[-LONG_MATCH:]:
            key = (key << 32 | token_id) & _LONG
        if len(tail) >= LONG_MATCH and (head := self._long_heads.get(key)) is not None:
            found = self._walk(head, self._long_links, tail, LONG_MATCH)
            if found.positions:
                return found
        if len(tail) >= MIN_MATCH and (head := self._short_heads.get(key & _SHORT)) is not None:
            return self._walk(head, self._short_links, tail, MIN_MATCH)
        return NO_OCCURRENCES

    def following(self, positions: Sequence[int]) -> dict[int, list[int]]:
        """By the token at each position, in the order given: the positions behind it. Ends of texts are left out."""
        tokens, first, end = self._tokens, self._first, self._first + len(self._tokens)
        if len(positions) == 1:
            position = positions[0]
            alone = self._start <= position < end and tokens[position - first] != SEPARATOR
            return {tokens[position - first]: [position + 1]} if alone else {}
        groups: dict[int, list[int]] = {}
        for position in positions:
            if self._start <= position < end and (token_id := tokens[position - first]) != SEPARATOR:
                groups.setdefault(token_id, []).append(position + 1)
        return groups

    def _walk(self, position: int, links: array[int], tail: Sequence[int], known: int) -> Occurrences:
        """The best of the newest MAX_OCCURRENCES along a chain.

        known: tokens in front of each position that are those of the tail, because the chain is theirs.
        """
        best, longest, seen = [], MIN_MATCH, 0
        tokens, first, start = self._tokens, self._first, self._start
        backwards = tail[::-1]
        while position >= start and seen < MAX_OCCURRENCES:
            before = position - first
            most = min(len(backwards), position - start)
            length = min(known, most)
            while length < most and tokens[before - length - 1] == backwards[length]:
                length += 1
            if length > longest:
                best, longest = [position], length
            elif length == longest:
                best.append(position)
            seen += length >= MIN_MATCH
            position = links[before]
        return Occurrences(tuple(best), longest) if best else NO_OCCURRENCES

    def _append(self, token_id: int, propose: bool) -> None:
        """propose: whether the token may be found as what followed those before it."""
        short_link = long_link = -1
        if propose:
            position, long, short = self._first + len(self._tokens), self._key, self._key & _SHORT
            short_link = self._short_heads.get(short, -1)
            long_link = self._long_heads.get(long, -1)
            self._short_heads[short] = self._long_heads[long] = position
        self._tokens.append(token_id)
        self._short_links.append(short_link)
        self._long_links.append(long_link)
        self._key = (self._key << 32 | token_id) & _LONG

    def _remove(self, count: int) -> None:
        """Remove the oldest tokens. A chain leads from new to old: only heads can point to what is the oldest."""
        for position in range(self._start, self._start + count):
            long, short = self._oldest_key, self._oldest_key & _SHORT
            if self._short_heads.get(short) == position:
                del self._short_heads[short]
            if self._long_heads.get(long) == position:
                del self._long_heads[long]
            self._oldest_key = (long << 32 | self._tokens[position - self._first]) & _LONG
            self._start = position + 1
        dead = self._start - self._first
        if dead > len(self) // 4:  # moving the rest costs a constant for each token removed
            for part in (self._tokens, self._short_links, self._long_links):
                del part[:dead]
            self._first = self._start
