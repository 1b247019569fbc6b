"""How the Triton kernel cuts a linear layer among its programs: arithmetic on shapes, without a GPU or Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from kernels.tree_attention.tiling import MIN_DOT, power_of_two

# Of a large GPU. The tiles decide on speed alone: see the kernel.
MULTIPROCESSORS = 132
FEW_ROWS = 64


@dataclass(frozen=True)
class LinearTiling:
    """Rows and outputs of a tile, inputs that are multiplied at a time, and how many of these are under way.

    outputs: of both matrices together, where a gated layer multiplies two.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def programs(self, rows: int, outputs: int) -> int:
        return -(-rows // self.rows) * -(-outputs // self.outputs)

    def shared_bytes(self, element_bytes: int) -> int:
        """What a program keeps of weights and rows."""
        return self.stages * (self.rows + self.outputs) * self.inputs * element_bytes


# A tile of many rows, and its time in proportion to the others' where each multiprocessor has one, as measured.
MANY_ROWS = (
    (LinearTiling(256, 128, 64, 8, 4), 2.0),
    (LinearTiling(128, 128, 64, 8, 4), 1.2),
    (LinearTiling(64, 128, 64, 8, 4), 0.72),
    (LinearTiling(64, 64, 64, 4, 6), 0.45),
)


@cache
def choose_linear_tiling(rows: int, outputs: int, element_bytes: int, shared_memory: int) -> LinearTiling:
    """The fastest tiling that fits.

    Few rows: as tall as they are, so that each weight is read once; deep where few programs have to keep the memory
    busy. Many: the tiles whose waves over the multiprocessors take least.
    shared_memory: bytes that a program may have.
    """
    if rows <= FEW_ROWS:
        tile = _height(rows)
        wide = LinearTiling(tile, 128, 64, 8, 4)
        if tile == FEW_ROWS and wide.programs(rows, outputs) >= MULTIPROCESSORS:
            return _fitting(wide, element_bytes, shared_memory)
        narrow = LinearTiling(tile, 64, 128, 4, 3)
        if narrow.programs(rows, outputs) < MULTIPROCESSORS:
            narrow = replace(narrow, stages=6)
        return _fitting(narrow, element_bytes, shared_memory)
    return _fitting(_fewest_waves(rows, outputs, MANY_ROWS), element_bytes, shared_memory)


@cache
def choose_gated_tiling(rows: int, inner: int, element_bytes: int, shared_memory: int) -> LinearTiling:
    """The same for a gated layer of `inner` outputs: half a tile's outputs are the gate's, 64 of them at least, as many
    as the widest instructions of tensor cores take."""
    if rows <= FEW_ROWS:
        tiling = LinearTiling(_height(rows), 128, 64, 4, 4)
        if tiling.programs(rows, 2 * inner) < MULTIPROCESSORS:
            tiling = replace(tiling, stages=8)
        return _fitting(tiling, element_bytes, shared_memory)
    wide = tuple(of_tiling for of_tiling in MANY_ROWS if of_tiling[0].outputs == 128)
    return _fitting(_fewest_waves(rows, 2 * inner, wide), element_bytes, shared_memory)


def _height(rows: int) -> int:
    """The smallest tile that holds few rows."""
    return max(MIN_DOT, power_of_two(rows))


def _fewest_waves(rows: int, outputs: int, tilings: Sequence[tuple[LinearTiling, float]]) -> LinearTiling:
    """The tiling whose waves over the multiprocessors take least."""
    waves = [(-(-tiling.programs(rows, outputs) // MULTIPROCESSORS) * time, tiling) for tiling, time in tilings]
    return min(waves, key=lambda of_tiling: of_tiling[0])[1]


def _fitting(tiling: LinearTiling, element_bytes: int, shared_memory: int) -> LinearTiling:
    """The tiling with as many stages as fit."""
    per_stage = tiling.shared_bytes(element_bytes) // tiling.stages
    return replace(tiling, stages=max(1, min(tiling.stages, shared_memory // per_stage)))
