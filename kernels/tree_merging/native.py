"""Merging on the CPU, by the rules of `speculation.merge` and of `speculation.experience.Reliability`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import byref
from itertools import accumulate, chain
from typing import NamedTuple, Protocol

from kernels.native.shared_library import load_for_short_calls
from kernels.native.structures import DraftsStruct, ScaleTablesStruct, UnionsStruct


class Tree(Protocol):
    """A sound tree: parents[0] is -1, every other parent stands before its children and is at least as sure."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def parents(self) -> Sequence[int]: ...
    @property
    def confidences(self) -> Sequence[float]: ...


class Merged(NamedTuple):
    """What one sequence's drafts have become, and the deepest level of any.

    corrected: the confidences of the union, corrected once more. maps: for each tree the union's node of each of its
    own, or -1. Of a single tree only its own confidences, corrected: the rest is empty.
    """

    deepest: int
    corrected: Sequence[float]
    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    maps: tuple[tuple[int, ...], ...] = ()


def merge_drafts(
    sequences: Sequence[Sequence[Tree]],
    most_nodes: Sequence[int],
    scales: Sequence[Sequence[float]],
    tree_scales: Sequence[int],
    union_scales: Sequence[int],
) -> list[Merged]:
    """The union of each sequence's trees, depth-first, siblings by falling confidence, as `merge_trees` makes it.

    sequences: at least one tree of each, all of a sequence with the same root. most_nodes: that each union keeps, the
    root not counted. scales: what confidences are corrected by at each depth, as logarithms; deeper nodes stay as they
    are. tree_scales, union_scales: which of them is for each of all trees, and for the union of each sequence.
    """
    trees = list(chain.from_iterable(sequences))
    counts = list(map(len, sequences))
    sizes = [len(tree.token_ids) for tree in trees]
    starts = array("i", accumulate(map(len, scales), initial=0))
    tables = array("d", chain.from_iterable(scales))
    given: tuple[array[int] | array[float], ...] = (
        array("i", counts),
        array("i", sizes),
        array("i", tree_scales),
        array("i", union_scales),
        array("i", most_nodes),
        array("i", chain.from_iterable([tree.token_ids for tree in trees])),
        array("i", chain.from_iterable([tree.parents for tree in trees])),
        array("d", chain.from_iterable([tree.confidences for tree in trees])),
    )
    unions = _Unions(len(counts), sum(sizes))
    # The structures hold addresses: these arrays outlive the call.
    load_for_short_calls().specserve_merge_trees(
        byref(ScaleTablesStruct(_address(starts), _address(tables))),
        byref(DraftsStruct(*[_address(part) for part in given])),
        len(counts),
        byref(unions.struct),
    )
    return unions.merged(counts, sizes)


class _Unions:
    """Room for the unions, and what was written there."""

    def __init__(self, sequences: int, nodes: int) -> None:
        def integers(size: int) -> array[int]:
            return array("i", bytes(4 * size))

        self._sizes, self._deepest = integers(sequences), integers(sequences)
        self._token_ids, self._parents, self._maps = integers(nodes), integers(nodes), integers(nodes)
        self._confidences, self._corrected = array("d", bytes(8 * nodes)), array("d", bytes(8 * nodes))
        of_nodes = self._token_ids, self._parents, self._confidences, self._corrected, self._maps
        self.struct = UnionsStruct(*[_address(part) for part in (self._sizes, self._deepest, *of_nodes)])

    def merged(self, counts: Sequence[int], sizes: Sequence[int]) -> list[Merged]:
        """counts: trees of each sequence. sizes: of all trees."""
        token_ids, parents, maps = self._token_ids.tolist(), self._parents.tolist(), self._maps.tolist()
        confidences, corrected = self._confidences.tolist(), self._corrected.tolist()
        merged: list[Merged] = []
        start = tree = 0
        for count, size, deepest in zip(counts, self._sizes, self._deepest, strict=True):
            end = start + size
            mapped: list[tuple[int, ...]] = []
            behind = start
            for own in sizes[tree : tree + count]:
                mapped.append(tuple(maps[behind : behind + own]))
                behind += own
            if count == 1:
                merged.append(Merged(deepest, corrected[start:behind]))
            else:
                nodes = tuple(token_ids[start:end]), tuple(parents[start:end])
                merged.append(
                    Merged(deepest, corrected[start:end], *nodes, tuple(confidences[start:end]), tuple(mapped))
                )
            start, tree = behind, tree + count
        return merged


def _address(numbers: array[int] | array[float]) -> int:
    return numbers.buffer_info()[0]
