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
# Bytes of a tile of keys, and half the bytes of a tile of queries. With `stages` of them they fit the shared
# memory of every GPU since Ampere (99 KiB).
TILE_BYTES = 16384
# About so many programs share the prefix of one sequence, at least LEAST_PARTS for each key head: enough to have every
# multiprocessor of a large GPU read, and no more, because a split costs a write and a read of float32 partial results.
PROGRAMS, LEAST_PARTS = 128, 8
LEAST_SPLIT_KEYS, MOST_SPLIT_KEYS = 128, 2048
# A row of a tree has its last OWN_LAG to 2 OWN_LAG - 1 entries to itself, from a multiple of OWN_LAG on. So a node that
# has so many nodes above it, itself among them, gets the sums that it gets in plain decoding, bit for bit.
OWN_LAG = 16


@dataclass(frozen=True)
class Splits:
    """Keys of a split, by what a row sees: the least of least, 2 least, 4 least, ..., most whose `parts` hold what is
    in front of the row's own entries, and `most` for a row without a mask: those of a prompt chunk are many, and need
    no splits to be shared out.

    least, most: multiples of tile_keys, most = least * 2**doublings.
    """

    least: int
    doublings: int
    parts: int

    @property
    def most(self) -> int:
        return self.least << self.doublings

    def most_splits(self, entries: int) -> int:
        """Bound for a row that may see `entries` entries."""
        return min(-(-entries // self.least), max(-(-entries // self.most), self.parts))


@dataclass(frozen=True)
class Tiling:
    """Rows and keys of a tile, and how keys are split; tile_keys is 16, 32 or 64.

    tile_rows may follow the batch; the others are the model's, for the sake of batch invariance.
    """

    tile_rows: int
    tile_keys: int
    splits: Splits


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
        splits=Splits(
            LEAST_SPLIT_KEYS,
            (MOST_SPLIT_KEYS // LEAST_SPLIT_KEYS).bit_length() - 1,
            max(LEAST_PARTS, power_of_two(PROGRAMS // kv_heads or 1)),
        ),
    )


def warps(tile_lines: int) -> int:
    """Warps of a program whose tile has this many lines."""
    return 8 if tile_lines >= WIDE_TILE else 4


def own_warps(line_bytes: int) -> int:
    """Warps of a program for the entries that one row has to itself; line_bytes: as for `choose_tiling`.

    As few as can hold the keys and values in registers: its loads follow on each other, and many such programs side by
    side hide it.
    """
    return max(1, line_bytes // 256)


def stages(element_bytes: int) -> int:
    """Tiles of keys under way and in use, of a program whose elements are so large."""
    return 3 if element_bytes <= 2 else 2


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()
