"""The draft loop for the CPU: forward passes and the choice of nodes, level by level, without Python in between."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from ctypes import byref
from dataclasses import dataclass
from itertools import accumulate

import torch

from kernels.decoder.native import NativeDecoder
from kernels.native.shared_library import load
from kernels.native.structures import ChildRuleStruct, DraftSequenceStruct, GrownTreeStruct, TreeBoundsStruct


@dataclass(frozen=True)
class TreeBounds:
    """The shape of a tree; the root does not count as a node.

    widths: children of a node by depth, for a static tree; empty for best-first growth, which evaluates at each depth
        the `beam` most probable nodes of the best `nodes`.
    floor: nodes of a lower log-probability are not evaluated.
    """

    nodes: int
    depth: int
    beam: int
    floor: float = -math.inf
    widths: tuple[int, ...] = ()

    @property
    def most_slots(self) -> int:
        """Entries that are written at most, the root's included."""
        return self.nodes + 1 if self.widths else 1 + self.beam * self.depth


@dataclass(frozen=True)
class ChildRule:
    """A token's score is logit / temperature, -inf where top_k, top_p or min_p (0, 1 and 0: off) leave it out, plus the
    Gumbel noise of (noise_seed, position) unless that is None; positions count from the sequence's first token.

    Children are the tokens of the highest scores; the confidence of a child is log softmax(scores / scale).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    noise_seed: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class DraftSequence:
    """One sequence and the tree that is wanted of it.

    blocks: the block table, long enough for `pending` and bounds.most_slots - 1 entries more.
    length: entries that are computed. pending: the tokens behind them, at least one; the last is the tree's root.
    """

    blocks: Sequence[int]
    length: int
    pending: Sequence[int]
    bounds: TreeBounds
    rule: ChildRule


@dataclass(frozen=True)
class GrownTree:
    """token_ids, parents, confidences: nodes depth-first, siblings best first; the root's parent is -1, a confidence is
    the log-probability of the node's path.

    slot_tokens, slot_parents: of what was evaluated: entry j behind the committed ones holds the key and value of token
    slot_tokens[j] below slot slot_parents[j]. Slot 0 is the root's, whose parent is -1.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    confidences: Sequence[float]
    slot_tokens: Sequence[int]
    slot_parents: Sequence[int]


class NativeDraftLoop:
    """The rules of growth are those of `speculation.expansion`, node for node, for trees without sampled children."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._library = load()
        self._decoder = decoder

    def grow(self, cache: torch.Tensor, block_size: int, sequences: Sequence[DraftSequence]) -> list[GrownTree]:
        """Compute each sequence's pending tokens and grow its tree below the last of them.

        cache: [layers, 2, slots, kv_heads, head_dim]. A sequence's tree does not depend on the others.
        """
        results = _Results([sequence.bounds for sequence in sequences])
        # The structures hold addresses: these arrays outlive the call.
        blocks = array("i", [block for sequence in sequences for block in sequence.blocks])
        pending = array("q", [token for sequence in sequences for token in sequence.pending])
        widths = array("q", [width for sequence in sequences for width in sequence.bounds.widths])
        orders = zip(
            sequences,
            _addresses(blocks, [len(sequence.blocks) for sequence in sequences]),
            _addresses(pending, [len(sequence.pending) for sequence in sequences]),
            _addresses(widths, [len(sequence.bounds.widths) for sequence in sequences]),
            strict=True,
        )
        structs = (DraftSequenceStruct * len(sequences))(*[_struct(*order) for order in orders])
        self._library.specserve_grow_trees(
            byref(self._decoder.struct),
            byref(self._decoder.kv_struct(cache)),
            block_size,
            structs,
            len(sequences),
            results.structs,
        )
        return results.trees()


class _Results:
    """Room for the trees of some bounds, and what was written there."""

    def __init__(self, bounds: Sequence[TreeBounds]) -> None:
        self._nodes = [1 + each.nodes for each in bounds]
        self._slots = [each.most_slots for each in bounds]
        node_room, slot_room = sum(self._nodes), sum(self._slots)
        self._token_ids, self._parents = _integers(node_room), _integers(node_room)
        self._confidences = array("f", bytes(4 * node_room))
        self._slot_tokens, self._slot_parents = _integers(slot_room), _integers(slot_room)
        rows = zip(
            *(_addresses(part, self._nodes) for part in (self._token_ids, self._parents, self._confidences)),
            *(_addresses(part, self._slots) for part in (self._slot_tokens, self._slot_parents)),
            strict=True,
        )
        self.structs = (GrownTreeStruct * len(bounds))(*[GrownTreeStruct(*row) for row in rows])

    def trees(self) -> list[GrownTree]:
        starts = zip(self.structs, _starts(self._nodes), _starts(self._slots), strict=True)
        return [
            GrownTree(
                self._token_ids[node : node + struct.nodes],
                self._parents[node : node + struct.nodes],
                self._confidences[node : node + struct.nodes],
                self._slot_tokens[slot : slot + struct.slots],
                self._slot_parents[slot : slot + struct.slots],
            )
            for struct, node, slot in starts
        ]


def _struct(sequence: DraftSequence, blocks: int, pending: int, widths: int) -> DraftSequenceStruct:
    """blocks, pending, widths: addresses."""
    bounds, rule = sequence.bounds, sequence.rule
    seed = rule.noise_seed
    return DraftSequenceStruct(
        blocks,
        len(sequence.blocks),
        sequence.length,
        pending,
        len(sequence.pending),
        TreeBoundsStruct(bounds.nodes, bounds.depth, bounds.beam, bounds.floor, widths if bounds.widths else None),
        ChildRuleStruct(rule.temperature, rule.scale, rule.top_k, rule.top_p, rule.min_p, seed is not None, seed or 0),
    )


def _integers(size: int) -> array[int]:
    return array("i", bytes(4 * size))


def _starts(counts: Sequence[int]) -> Iterator[int]:
    return accumulate(counts[:-1], initial=0)


def _addresses(numbers: array[int] | array[float], counts: Sequence[int]) -> Iterator[int]:
    """Where each of the parts of so many numbers begins in memory."""
    base, size = numbers.buffer_info()[0], numbers.itemsize
    return (base + size * start for start in _starts(counts))
