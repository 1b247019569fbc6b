"""How tree attention is cut for a GPU."""

from __future__ import annotations

from kernels.tree_attention.tiling import Tiling, choose_tiling


def test_tiling_follows_the_shape() -> None:
    # one row, or a batch of sequences of one row each: the lines of one row
    assert choose_tiling(1, 1, 32, 8, 256) == choose_tiling(64, 64, 32, 8, 256) == Tiling(1, 64, 512)
    # a tree of 64 nodes, a key head for each query head: one tile; four query heads to a key head: two
    assert choose_tiling(64, 1, 32, 32, 256) == Tiling(64, 64, 1024)
    assert choose_tiling(64, 1, 32, 8, 256) == Tiling(32, 64, 512)
    # float32: fewer lines, fewer keys
    assert choose_tiling(64, 1, 32, 8, 512) == Tiling(16, 32, 512)


def test_keys_are_cut_by_the_model_alone() -> None:
    cuts = {
        (tiling.tile_keys, tiling.split_keys)
        for rows in (1, 5, 64, 512)
        for sequences in (1, 3, rows)
        for tiling in [choose_tiling(rows, sequences, 12, 4, 256)]
    }
    assert cuts == {(64, 256)}
