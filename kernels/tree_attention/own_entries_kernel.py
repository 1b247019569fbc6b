# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Attention of one row and query head over the entries that it has to itself, joined with that over the splits.

A node's ancestors are taken in their order as if they stood behind each other, which is how they stand in the cache
once they are accepted: a node in a tree and the same token in plain decoding add up the same numbers in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.dependent_launch import wait_for_kernel_before
from kernels.tree_attention.rows import UNALIGNED, row_cuts, slots_of


@triton.jit
def _own_entries(
    masks,
    row,
    prefix,
    first,
    WORDS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """int32 [KEYS]: the logical entries number first, first + 1, ... of those that the row sees, in their order."""
    number = first + tl.arange(0, KEYS)
    entry = tl.where(number < prefix, number, 0)
    bit = tl.arange(0, 64)
    counted = prefix
    for word in tl.static_range(WORDS):
        bits = tl.load(masks + row.to(tl.int64) * WORDS + word).to(tl.uint64, bitcast=True)
        there = ((bits >> bit.to(tl.uint64)) & 1).to(tl.int32)
        place = counted + tl.cumsum(there, axis=0) - 1
        match = (there == 1)[None, :] & (place[None, :] == number[:, None])
        entry += tl.sum(tl.where(match, (prefix + 64 * word + bit)[None, :], 0), axis=1)
        counted += tl.sum(there, axis=0)
    return entry


@triton.jit
def _load_splits(partial, maxima, sums, split, splits, lines, line, dim, HEAD_DIM: tl.constexpr):
    """Maxima and sums [CHUNK] and unscaled results [CHUNK, DIM_PADDED] of some splits of a line."""
    there = split < splits
    place = split * lines + line
    place_ok = there[:, None] & (dim[None, :] < HEAD_DIM)
    return (
        tl.load(maxima + place, mask=there, other=float("-inf")),
        tl.load(sums + place, mask=there, other=0.0),
        tl.load(partial + place[:, None] * HEAD_DIM + dim[None, :], mask=place_ok, other=0.0),
    )


@triton.jit
def _join(highest, total, joined, maxima, sums, results):
    """(maximum, sum, unscaled result) of a line together with those of some more of its entries, [N], [N] and [N, D].

    out = Σ 2^(max_s - max) acc_s / Σ 2^(max_s - max) sum_s
    """
    higher = tl.maximum(highest, tl.max(maxima, axis=0))
    reference = tl.where(higher == float("-inf"), 0.0, higher)
    share, decay = tl.exp2(maxima - reference), tl.exp2(highest - reference)
    total = total * decay + tl.sum(share * sums, axis=0)
    joined = joined * decay + tl.sum(share[:, None] * results, axis=0)
    return higher, total, joined


@triton.jit(do_not_specialize=["rows", "max_blocks", "max_splits"], do_not_specialize_on_alignment=UNALIGNED)
def own_entries_kernel(
    query,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    keys,  # [slots, KV_HEADS, HEAD_DIM]
    values,
    block_tables,  # [sequences, max_blocks]
    row_sequences,
    prefix_lengths,
    masks,  # [rows, WORDS]
    partial,  # float32 [splits, rows, heads, HEAD_DIM]
    maxima,  # float32 [splits, rows, heads]
    sums,
    out,  # like query
    rows,
    max_blocks,
    max_splits,
    scale,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    PARTS: tl.constexpr,
    OWN_LAG: tl.constexpr,
    OWN_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The row's own entries need none of the splits: where launches are dependent, both kernels run side by side."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    one = tl.arange(0, 1)
    prefixes = tl.load(prefix_lengths + row + one)
    table = block_tables + tl.load(row_sequences + row).to(tl.int64) * max_blocks
    starts, ends, split_keys = row_cuts(
        prefixes, masks, row + one, one == 0, WORDS, LEAST_SPLIT, DOUBLINGS, PARTS, OWN_LAG
    )  # fmt: skip
    prefix, start, end = tl.max(prefixes, axis=0), tl.max(starts, axis=0), tl.max(ends, axis=0)
    splits = tl.minimum(tl.max((starts + split_keys - 1) // split_keys, axis=0), max_splits)
    dim = tl.arange(0, DIM_PADDED)
    lines = rows.to(tl.int64) * (KV_HEADS * GROUP)
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + head
    q = tl.load(query + line * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32) * scale
    highest = float("-inf")
    total = 0.0
    joined = tl.zeros([DIM_PADDED], tl.float32)
    for first in range(start, end, OWN_KEYS):
        seen = first + tl.arange(0, OWN_KEYS) < end
        entry = _own_entries(masks, row, prefix, first, WORDS, OWN_KEYS)
        slot = slots_of(table, entry, seen, BLOCK_SIZE)
        place = (slot[:, None] * KV_HEADS + head // GROUP) * HEAD_DIM + dim[None, :]
        place_ok = seen[:, None] & (dim[None, :] < HEAD_DIM)
        k = tl.load(keys + place, mask=place_ok, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=place_ok, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(k * q[None, :], axis=1), float("-inf"))
        highest, total, joined = _join(highest, total, joined, scores, tl.where(seen, 1.0, 0.0), v)
    wait_for_kernel_before(DEPENDENT)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        of_splits = _load_splits(partial, maxima, sums, split, splits, lines, line, dim, HEAD_DIM)
        highest, total, joined = _join(highest, total, joined, of_splits[0], of_splits[1], of_splits[2])
    joined = joined / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
