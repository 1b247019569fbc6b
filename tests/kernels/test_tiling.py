"""How tree attention and linear layers are cut for a GPU."""

from __future__ import annotations

import pytest

from kernels.packed_linear.tiling import FEW_ROWS, LinearTiling, choose_gated_tiling, choose_linear_tiling
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


def test_no_row_has_more_splits_than_are_launched() -> None:
    for splits in (Splits(128, 4, 8), Splits(128, 4, 64), Splits(32, 0, 1), Splits(4096, 0, 1), Splits(32, 2, 1)):
        for shared in (*range(0, 300), *range(300, 40000, 61)):
            for of_prompt in (False, True):
                keys = splits.least
                for _ in range(splits.doublings):  # as the kernel reckons
                    keys *= 2 if of_prompt or keys * splits.parts < shared else 1
                assert -(-shared // keys) <= splits.most_splits(shared)
                assert -(-shared // keys) <= splits.most_splits(40000)


HOPPER, AMPERE = 227 * 1024, 99 * 1024


@pytest.mark.parametrize("shared_memory", [HOPPER, AMPERE])
@pytest.mark.parametrize("outputs", [8, 4096, 12288, 128_256])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 200, 256, 5000])
def test_tiles_of_a_linear_layer_fit(rows: int, outputs: int, shared_memory: int) -> None:
    gated = choose_gated_tiling(rows, outputs, 2, shared_memory)
    for tiling in (choose_linear_tiling(rows, outputs, 2, shared_memory), gated):
        assert tiling.shared_bytes(2) <= shared_memory
        assert tiling.stages >= 2
        if rows <= FEW_ROWS:
            assert tiling.programs(rows, outputs) == -(-outputs // tiling.outputs), "weights are read once"
    assert gated.outputs == 128, "the gate's 64 and as many"


def test_tiles_of_a_linear_layer_follow_its_shape() -> None:
    # few programs: deep; many: not; as tall as 64 rows: wide, where there are enough for every multiprocessor
    assert choose_linear_tiling(1, 4096, 2, HOPPER) == LinearTiling(16, 64, 128, 4, 6)
    assert choose_linear_tiling(1, 22016, 2, HOPPER) == LinearTiling(16, 64, 128, 4, 3)
    assert choose_linear_tiling(64, 22016, 2, HOPPER) == LinearTiling(64, 128, 64, 8, 4)
    assert choose_linear_tiling(2048, 4096, 2, HOPPER) == LinearTiling(256, 128, 64, 8, 4)
    assert choose_linear_tiling(512, 4096, 2, HOPPER) == LinearTiling(128, 128, 64, 8, 4)
