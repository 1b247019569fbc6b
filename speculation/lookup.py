"""Draft trees without a model: what followed earlier occurrences of the text's end (prompt look-up decoding, Saxena,
2023; SuffixDecoding, Oliaro et al., 2024), each node with the probability that experience gives it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from speculation.suffix_index import MAX_MATCH, SuffixIndex
from speculation.tree import TokenTree

_PRIOR_TRIES = 4.0
_MOST_TRIES = 512.0


class Reliability:
    """How often one of the continuations of a match came true, by the match's length; learned while drafting.

    The prior for m tokens is (m - 1) / (m + 1), with the weight of _PRIOR_TRIES. Counts are halved when they reach
    _MOST_TRIES: what is old fades.
    """

    def __init__(self) -> None:
        self._tries = [_PRIOR_TRIES] * (MAX_MATCH + 1)
        self._hits = [_PRIOR_TRIES * max(length - 1, 0) / (length + 1) for length in range(MAX_MATCH + 1)]

    def of(self, length: int) -> float:
        """P(the next token is among the continuations of a match of so many tokens), in [0, 1]."""
        bucket = min(length, MAX_MATCH)
        return self._hits[bucket] / self._tries[bucket]

    def learn(self, length: int, hit: bool) -> None:
        bucket = min(length, MAX_MATCH)
        self._tries[bucket] += 1
        self._hits[bucket] += hit
        if self._tries[bucket] >= _MOST_TRIES:
            self._tries[bucket] /= 2
            self._hits[bucket] /= 2


@dataclass(frozen=True)
class LookupBounds:
    """nodes, depth: most nodes below the root, and levels. widths: most children by depth; empty: any number.

    floor: least probability of a node's whole path.
    """

    nodes: int
    depth: int
    widths: tuple[int, ...] = ()
    floor: float = 0.0

    def width(self, depth: int) -> int:
        """Most children of a node of this depth."""
        if depth >= self.depth:
            return 0
        if not self.widths:
            return self.nodes
        return self.widths[depth] if depth < len(self.widths) else 0


class Claim(NamedTuple):
    """What is said of the token behind a node: that it is one of `token_ids`, because `length` tokens match."""

    length: int
    token_ids: Container[int]


@dataclass(frozen=True, eq=False)
class LookupDraft:
    """A tree, and for its nodes what was claimed of the tokens behind them, also of those that were left out of it."""

    tree: TokenTree
    claims: dict[int, Claim] = field(default_factory=dict)

    def teach(self, reliability: Reliability, token_ids: Sequence[int]) -> None:
        """Compare the claims with the tokens that really follow the root."""
        node: int | None = 0
        for token_id in token_ids:
            if node is None or (claim := self.claims.get(node)) is None:
                return
            hit = token_id in claim.token_ids
            reliability.learn(claim.length, hit)
            node = self._child(node, token_id) if hit else None

    def _child(self, node: int, token_id: int) -> int | None:
        tree = self.tree
        for child in range(node + 1, len(tree.token_ids)):
            if tree.parents[child] == node and tree.token_ids[child] == token_id:
                return child
        return None


def grow_lookup_tree(
    index: SuffixIndex, tail: Sequence[int], reliability: Reliability, bounds: LookupBounds, source: str
) -> LookupDraft:
    """The most probable continuations of a text that ends with `tail`, best first; the root alone without a match.

    Of a node at depth d below a match of m tokens, P(child | the node is right) is the share of the child's token among
    what followed the match, times the reliability of m + d tokens.
    """
    found = index.find(tail)
    if not found.positions or bounds.nodes < 1:
        return LookupDraft(TokenTree.of_sound_parts((tail[-1],), (-1,), {}, source, (0.0,)))
    token_ids, parents, depths, confidences = [tail[-1]], [-1], [0], [0.0]
    claims: dict[int, Claim] = {}
    floor = math.log(bounds.floor) if bounds.floor > 0 else -math.inf
    # (-confidence, number, parent, token, positions behind it); of equal ones that with the newest occurrence is first.
    open_nodes: list[tuple[float, int, int, int, Sequence[int]]] = []
    numbers = itertools.count()
    node = 0
    positions: Sequence[int] = found.positions
    while True:
        width = bounds.width(depths[node])
        if following := index.following(positions) if width else None:
            length = found.length + depths[node]
            claims[node] = Claim(length, following)
            share = reliability.of(length) / sum(map(len, following.values()))
            for token_id, behind in _most_frequent(following, width):
                if share > 0 and (confidence := confidences[node] + math.log(share * len(behind))) >= floor:
                    heapq.heappush(open_nodes, (-confidence, next(numbers), node, token_id, behind))
        if not open_nodes or len(token_ids) > bounds.nodes:
            break
        negative, _, parent, token_id, positions = heapq.heappop(open_nodes)
        node = len(token_ids)
        token_ids.append(token_id)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        confidences.append(-negative)
    tree = TokenTree(tuple(token_ids), tuple(parents), source=source, confidences=tuple(confidences))
    return LookupDraft(tree, claims)


def _most_frequent(following: Mapping[int, Sequence[int]], width: int) -> Iterable[tuple[int, Sequence[int]]]:
    """The tokens with the most positions behind them; of equal ones the order stays."""
    if len(following) == 1:
        return following.items()
    return sorted(following.items(), key=lambda group: -len(group[1]))[:width]
