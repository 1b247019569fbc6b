"""How tree attention is cut for a GPU."""

from __future__ import annotations

import pytest

from kernels.tree_attention.tiling import Splits, Tiling, choose_tiling


def test_tiling_follows_the_shape() -> None:
    whole, grouped = Splits(128, 4, 8), Splits(128, 4, 16)
    # one row, or a batch of sequences of one row each: the lines of one row
    assert choose_tiling(1, 1, 32, 8, 256) == choose_tiling(64, 64, 32, 8, 256) == Tiling(1, 64, grouped)
    # a tree of 64 nodes, a key head for each query head: one tile; four query heads to a key head: two
    assert choose_tiling(64, 1, 32, 32, 256) == Tiling(64, 64, whole)
    assert choose_tiling(64, 1, 32, 8, 256) == Tiling(32, 64, grouped)
    # float32: fewer lines, fewer keys
    assert choose_tiling(64, 1, 32, 8, 512) == Tiling(16, 32, grouped)


def test_keys_are_cut_by_the_model_alone() -> None:
    cuts = {
        (tiling.tile_keys, tiling.splits)
        for rows in (1, 5, 64, 512)
        for sequences in (1, 3, rows)
        for tiling in [choose_tiling(rows, sequences, 12, 4, 256)]
    }
    assert cuts == {(64, Splits(128, 4, 32))}


@pytest.mark.parametrize("words", [1, 4])
def test_no_row_has_more_splits_than_are_launched(words: int) -> None:
    for splits in (Splits(128, 4, 8), Splits(128, 4, 64), Splits(32, 0, 1), Splits(4096, 0, 1), Splits(32, 2, 1)):
        for prefix in (*range(0, 300), *range(300, 40000, 61)):
            for end in (prefix, prefix + 64 * words):
                keys = splits.least
                for _ in range(splits.doublings):  # as the kernel reckons
                    keys *= 2 if end == prefix or keys * splits.parts < prefix else 1
                if end:
                    assert -(-end // keys) <= splits.most_splits(end, words)
                    assert -(-end // keys) <= splits.most_splits(max(end, 40000), words)
