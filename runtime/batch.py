"""The flat batch: rows of prompt chunks and of trees of all sequences, for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.decoder.native import StepRows
from runtime.kv_cache import BLOCK_SIZE, CachedSequence


@dataclass(frozen=True)
class Segment:
    """The rows of one sequence.

    token_ids, positions: token and rotary position of each row.
    first_entry: logical KV entry that the first row writes; the others follow.
    prefix_lengths: every row sees the entries before this one.
    masks: of the entries from its prefix length on, row i also sees number j when bit j of masks[i] is set.
    """

    cache: CachedSequence
    token_ids: Sequence[int]
    positions: Sequence[int]
    first_entry: int
    prefix_lengths: Sequence[int]
    masks: Sequence[int]

    @classmethod
    def chain(
        cls, cache: CachedSequence, token_ids: Sequence[int], start: int, decoded_from: int | None = None
    ) -> Segment:
        """Consecutive tokens at positions start, start + 1, ...: each sees all entries before it and its own.

        decoded_from: position of the first token that was the root of a tree once. From there on each row is that of a
        tree of one node again: where kernels add up a prompt's rows in another order, it gets the bits that it had.
        """
        positions = range(start, start + len(token_ids))
        masks = [int(decoded_from is not None and position >= decoded_from) for position in positions]
        prefix_lengths = [position + 1 - mask for position, mask in zip(positions, masks, strict=True)]
        return cls(cache, token_ids, positions, start, prefix_lengths, masks)

    @classmethod
    def tree(
        cls,
        cache: CachedSequence,
        token_ids: Sequence[int],
        depths: Sequence[int],
        masks: Sequence[int],
        start: int,
        written: int = 0,
    ) -> Segment:
        """Nodes of a tree whose root is the sequence's token number `start`.

        depths: of each node, the root's is 0. masks: bit j means the tree's j-th entry, which is the sequence's entry
        start + j; a node sees itself.
        written: how many entries of the tree are in the cache already; these rows write the ones behind them.
        """
        positions = [start + depth for depth in depths]
        return cls(cache, token_ids, positions, start + written, [start] * len(token_ids), masks)

    def slots(self) -> list[int]:
        """Where each row's key and value go."""
        blocks, entries = self.cache.blocks, range(self.first_entry, self.first_entry + len(self.token_ids))
        return [blocks[entry // BLOCK_SIZE] * BLOCK_SIZE + entry % BLOCK_SIZE for entry in entries]


@dataclass(frozen=True)
class FlatBatch:
    """Tensors of one forward pass; the rows of a sequence are consecutive.

    token_ids, positions, slots: int64 [rows]. slots: where each row's key and value go.
    row_sequences: int32 [rows], row of block_tables. prefix_lengths: int32 [rows]. masks: int64 [rows, words].
    block_tables: int32 [sequences, blocks], padded with 0.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    row_sequences: torch.Tensor
    prefix_lengths: torch.Tensor
    masks: torch.Tensor
    block_tables: torch.Tensor

    def to(self, device: torch.device) -> FlatBatch:
        return FlatBatch(*(tensor.to(device) for tensor in vars(self).values()))

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> FlatBatch:
        """Lay the segments out one behind the other. Every cache must have the blocks that its rows write."""
        wide, narrow, masks, tables = (torch.from_numpy(array).to(device) for array in HostBatch.of(segments))
        token_ids, positions, slots = wide.unbind()
        row_sequences, prefix_lengths = narrow.unbind()
        return cls(token_ids, positions, slots, row_sequences, prefix_lengths, masks, tables)


class HostBatch(NamedTuple):
    """A flat batch on its way to the device: few arrays, each of which is one copy.

    wide: int64 [3, rows], tokens, positions and slots. narrow: int32 [2, rows], sequences and prefix lengths.
    """

    wide: NDArray[np.int64]
    narrow: NDArray[np.int32]
    masks: NDArray[np.int64]
    block_tables: NDArray[np.int32]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> HostBatch:
        """See FlatBatch.of."""
        rows = rows_of(segments)
        words, masks = rows.mask_words()
        blocks, tables = rows.padded_tables()
        return cls(
            np.array([rows.token_ids, rows.positions, rows.slots], dtype=np.int64),
            np.array([rows.row_sequences, rows.prefix_lengths], dtype=np.int32),
            np.array(masks, dtype=np.uint64).view(np.int64).reshape(-1, words),
            np.array(tables, dtype=np.int32).reshape(-1, blocks),
        )


def rows_of(segments: Sequence[Segment]) -> StepRows:
    """The segments' rows, one behind the other."""
    return StepRows(
        [token for s in segments for token in s.token_ids],
        [position for s in segments for position in s.positions],
        [place for s in segments for place in s.slots()],
        [index for index, s in enumerate(segments) for _ in s.token_ids],
        [length for s in segments for length in s.prefix_lengths],
        [mask for s in segments for mask in s.masks],
        [s.cache.blocks for s in segments],
    )
