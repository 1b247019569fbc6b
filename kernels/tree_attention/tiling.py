"""How the Triton kernel cuts tree attention among its programs: arithmetic on shapes, without a GPU or Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# A matrix product on tensor cores wants at least this many rows, columns and summands.
MIN_DOT = 16
MAX_LINES = 128
# From this many lines on a tile is computed by eight warps.
WIDE_TILE = 128
MAX_TILE_KEYS = 64  # a mask word
# Bytes of a tile of keys, and half the bytes of a tile of queries. With two stages of loads ahead, they fit the shared
# memory of every GPU since Ampere (99 KiB).
TILE_BYTES = 16384
# Keys of a split: 64 for each key head, so that 16k keys give a few hundred programs for any model; within bounds,
# because a split costs a write and a read of float32 partial results, and a program's pipeline needs a few tiles.
SPLIT_KEYS_PER_HEAD, MIN_SPLIT_KEYS, MAX_SPLIT_KEYS = 64, 256, 1024


@dataclass(frozen=True)
class Tiling:
    """Rows and keys of a tile, and keys of a split: a multiple of tile_keys, which is 16, 32 or 64.

    tile_rows may follow the batch; the other two are the model's, for the sake of batch invariance.
    """

    tile_rows: int
    tile_keys: int
    split_keys: int


@cache
def choose_tiling(rows: int, sequences: int, heads: int, kv_heads: int, line_bytes: int) -> Tiling:
    """Tiles as tall as the mean sequence has rows; keys by the model's shape.

    line_bytes: size of one head of one key, padded to a power of two.
    """
    mean_rows = power_of_two(-(-rows // max(1, sequences)))
    tile_lines = max(MIN_DOT, min(MAX_LINES, 2 * TILE_BYTES // line_bytes))
    return Tiling(
        tile_rows=max(1, min(mean_rows, tile_lines // power_of_two(heads // kv_heads))),
        tile_keys=max(MIN_DOT, min(MAX_TILE_KEYS, TILE_BYTES // line_bytes)),
        split_keys=min(MAX_SPLIT_KEYS, max(MIN_SPLIT_KEYS, power_of_two(SPLIT_KEYS_PER_HEAD * kv_heads))),
    )


def warps(tile_lines: int) -> int:
    """Warps of a program whose tile has this many lines."""
    return 8 if tile_lines >= WIDE_TILE else 4


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()
