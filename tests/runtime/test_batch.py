"""The layout of a flat batch, value by value."""

from __future__ import annotations

import torch

from runtime.batch import FlatBatch, Segment
from runtime.kv_cache import BLOCK_SIZE, CachedSequence

CPU = torch.device("cpu")


def test_segments_stand_one_behind_the_other() -> None:
    chunk = CachedSequence(blocks=[4, 2])
    tree = CachedSequence(blocks=[7, 3, 5])
    start = BLOCK_SIZE - 1  # the chunk and the tree cross a block boundary
    batch = FlatBatch.of(
        [
            Segment.chain(chunk, [11, 12, 13], start),
            Segment.tree(tree, [21, 22, 23, 24], [0, 1, 1, 2], [1, 3, 5, 11], start=start),
        ],
        CPU,
    )
    assert batch.token_ids.tolist() == [11, 12, 13, 21, 22, 23, 24]
    assert batch.positions.tolist() == [start, start + 1, start + 2, start, start + 1, start + 1, start + 2]
    ends, nexts = [block * BLOCK_SIZE + start for block in (4, 7)], [block * BLOCK_SIZE for block in (2, 3)]
    assert batch.slots.tolist() == [ends[0], nexts[0], nexts[0] + 1, ends[1], nexts[1], nexts[1] + 1, nexts[1] + 2]
    assert batch.row_sequences.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.prefix_lengths.tolist() == [start + 1, start + 2, start + 3, start, start, start, start]
    assert batch.masks.tolist() == [[0], [0], [0], [1], [3], [5], [11]]
    assert batch.block_tables.tolist() == [[4, 2, 0], [7, 3, 5]]


def test_rows_behind_written_nodes_follow_them_in_the_cache() -> None:
    sequence = CachedSequence(blocks=[1, 0])
    batch = FlatBatch.of([Segment.tree(sequence, [5], [2], [0b1011], start=14, written=3)], CPU)
    assert batch.positions.tolist() == [16]
    assert batch.slots.tolist() == [1]
    assert batch.prefix_lengths.tolist() == [14]


def test_decoded_tokens_of_a_chain_are_trees_of_one_node() -> None:
    sequence = CachedSequence(blocks=[0])
    for decoded_from, masks in ((None, [0, 0, 0]), (9, [0, 0, 0]), (6, [0, 1, 1]), (2, [1, 1, 1])):
        batch = FlatBatch.of([Segment.chain(sequence, [1, 2, 3], 5, decoded_from)], CPU)
        assert batch.masks.flatten().tolist() == masks
        assert batch.prefix_lengths.tolist() == [6 - masks[0], 7 - masks[1], 8 - masks[2]]
        assert batch.positions.tolist() == [5, 6, 7]


def test_long_masks_take_as_many_words_as_the_longest() -> None:
    sequence = CachedSequence(blocks=list(range(12)))
    masks = [1, 1 | 1 << 63, 1 << 64 | 3, 1 << 130 | 1 << 64]
    batch = FlatBatch.of([Segment.tree(sequence, [0] * 4, [0, 1, 2, 3], masks, start=0)], CPU)
    assert batch.masks.tolist() == [[1, 0, 0], [1 - 2**63, 0, 0], [3, 1, 0], [0, 1, 4]]


def test_types_are_those_of_the_kernels() -> None:
    batch = FlatBatch.of([Segment.chain(CachedSequence(blocks=[0]), [1, 2], 0)], CPU)
    for name in ("token_ids", "positions", "slots", "masks"):
        assert getattr(batch, name).dtype is torch.int64, name
    for name in ("row_sequences", "prefix_lengths", "block_tables"):
        assert getattr(batch, name).dtype is torch.int32, name
    assert all(tensor.is_contiguous() for tensor in vars(batch).values())
