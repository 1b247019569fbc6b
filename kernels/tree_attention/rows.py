# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""What both kernels of tree attention ask of a row: which entries it has to itself, and where entries are."""

from __future__ import annotations

import triton
import triton.language as tl

# Where the views of a batch's buffers start is not specialised on: what is compiled for a new place keeps requests
# waiting for a second.
UNALIGNED = ["block_tables", "row_sequences", "prefix_lengths", "masks"]


@triton.jit
def _bits_set(word):
    """int32, like the uint64 `word`: how many of its bits are set."""
    pairs = word - ((word >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def row_cuts(
    prefix,  # int32 [M], of each row
    masks,
    row,
    row_ok,
    WORDS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    PARTS: tl.constexpr,
    OWN_LAG: tl.constexpr,
):
    """int32 [M] each: where the entries begin that a row has to itself, how many entries it sees, and the keys of a
    split; see tiling.Splits.

    A function of how many entries it sees alone, where OWN_LAG nodes or fewer are among them. A row without nodes, one
    of a prompt, has no entries to itself.
    """
    nodes = tl.zeros(prefix.shape, tl.int32)
    for word in tl.static_range(WORDS):
        bits = tl.load(masks + row.to(tl.int64) * WORDS + word, mask=row_ok, other=0)
        nodes += _bits_set(bits.to(tl.uint64, bitcast=True))
    seen = prefix + nodes
    own = tl.maximum(tl.minimum(seen - OWN_LAG, prefix), 0) // OWN_LAG * OWN_LAG
    own = tl.where(nodes == 0, prefix, own)
    split_keys = tl.full(prefix.shape, LEAST_SPLIT, tl.int32)
    for _ in tl.static_range(DOUBLINGS):
        split_keys = tl.where((nodes == 0) | (split_keys * PARTS < own), 2 * split_keys, split_keys)
    return own, seen, split_keys


@triton.jit
def slots_of(
    table,  # the sequence's row of block_tables
    entry,
    seen,  # bool [K]: others are not read, their blocks need not exist
    BLOCK_SIZE: tl.constexpr,
):
    """int64 [K]: where the entries stand in the cache."""
    block = tl.load(table + entry // BLOCK_SIZE, mask=seen, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + entry % BLOCK_SIZE
