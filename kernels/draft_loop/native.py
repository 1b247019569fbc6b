"""The draft loop for the CPU: forward passes and the choice of nodes, level by level, without Python in between."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_float, c_int32, c_int64
from dataclasses import dataclass

import torch

from kernels.decoder.native import NativeDecoder
from kernels.native.library import load
from kernels.native.structures import GrownTreeStruct, SequenceCacheStruct, TreeBoundsStruct


@dataclass(frozen=True)
class TreeBounds:
    """The shape of a tree; the root does not count as a node.

    widths: children of a node by depth, for a static tree; empty for best-first growth, which evaluates at each depth
        the `beam` most probable nodes of the best `nodes`.
    floor: nodes of a lower log-probability are not evaluated.
    temperature: the probability of a child is softmax(logits / temperature).
    """

    nodes: int
    depth: int
    beam: int
    floor: float
    widths: tuple[int, ...] = ()
    temperature: float = 1.0


@dataclass(frozen=True)
class GrownTree:
    """All candidates in the order in which they were added, the root first.

    parents: -1 for the root. confidences: log-probability of each path.
    evaluated: entry number j behind the committed ones holds the key and value of candidate evaluated[j].
    """

    token_ids: list[int]
    parents: list[int]
    confidences: list[float]
    evaluated: list[int]


class NativeDraftLoop:
    """The rules of growth are those of greedy drafting in `speculation.expansion`, node for node."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._library = load()
        self._decoder = decoder

    def grow(
        self,
        cache: torch.Tensor,
        blocks: Sequence[int],
        block_size: int,
        length: int,
        pending: Sequence[int],
        bounds: TreeBounds,
    ) -> GrownTree:
        """Compute a sequence's last tokens and grow the tree below the last of them.

        cache: [layers, 2, slots, kv_heads, head_dim]. blocks: the sequence's block table, long enough for `pending` and
        every evaluated node. length: entries that are computed. pending: the tokens behind them, at least one.
        """
        sequence = SequenceCacheStruct(
            self._decoder.kv_struct(cache),
            (c_int32 * len(blocks))(*blocks),
            len(blocks),
            block_size,
            length,
        )
        widths = (c_int64 * len(bounds.widths))(*bounds.widths) if bounds.widths else None
        shape = TreeBoundsStruct(bounds.nodes, bounds.depth, bounds.beam, bounds.floor, bounds.temperature, widths)
        room = 1 + bounds.nodes * bounds.depth
        integers = c_int32 * room
        tree = GrownTreeStruct(integers(), integers(), (c_float * room)(), integers(), 0, 0)
        tokens = (c_int64 * len(pending))(*pending)
        self._library.specserve_grow_tree(
            byref(self._decoder.struct), byref(sequence), tokens, len(pending), byref(shape), byref(tree)
        )
        return GrownTree(
            tree.token_ids[: tree.nodes],
            tree.parents[: tree.nodes],
            tree.confidences[: tree.nodes],
            tree.evaluated[: tree.evaluated_count],
        )
