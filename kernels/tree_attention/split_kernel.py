# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Attention of a tile of rows and one key head over one split of the entries that the rows share."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.dependent_launch import wait_for_kernel_before
from kernels.tree_attention.rows import UNALIGNED, row_cuts, slots_of

# Weights are at most 1: 64 lanes of less than 2^17 of them each fit an int64.
FIXED_POINT = tl.constexpr(2.0**40)


@triton.jit
def _absorb_tile(
    q,
    keys,
    values,
    slot,
    seen,  # bool [K]: entries that any line sees; others are not read: they may hold NaN
    visible,  # bool [M, K], or [M, 1] where a line sees all of the tile or nothing
    scale,
    maximum,
    lanes,
    accumulator,
    kv_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """One step of the online softmax over a tile of keys; `lanes` [M, K] holds sums of weights, one for each place in a
    tile: to add up a tile's weights would take an order that follows the layout.
    """
    dim = tl.arange(0, DIM_PADDED)
    place = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    place_ok = seen[:, None] & (dim[None, :] < HEAD_DIM)
    k = tl.load(keys + place, mask=place_ok, other=0.0).to(q.dtype)
    v = tl.load(values + place, mask=place_ok, other=0.0).to(q.dtype)
    scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    # A line that has seen nothing yet: any finite reference gives 2^-inf = 0.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(tl.fma(scores, scale, (reference * -scale)[:, None]))
    # Exactly 1 where the maximum stays: a tile of which a line sees nothing leaves its sums as they are.
    decay = tl.exp2((maximum - reference) * scale)
    lanes = tl.fma(lanes, decay[:, None], weights)
    accumulator = accumulator * decay[:, None]
    accumulator += tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    return highest, lanes, accumulator


@triton.jit
def _in_any_order(lanes):
    """float32 [M]: Σ lanes [M, K] over K, whatever the order: as integers, whose sum has no rounding."""
    return tl.sum((lanes * FIXED_POINT).to(tl.int64), axis=1).to(tl.float32) * (1 / FIXED_POINT)


@triton.jit(do_not_specialize=["rows", "max_blocks"], do_not_specialize_on_alignment=UNALIGNED)
def split_kernel(
    query,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    keys,  # [slots, KV_HEADS, HEAD_DIM]
    values,
    block_tables,  # [sequences, max_blocks]
    row_sequences,
    prefix_lengths,
    masks,  # [rows, WORDS]
    partial,  # float32 [splits, rows, heads, HEAD_DIM], not yet divided by the sums
    maxima,  # float32 [splits, rows, heads]
    sums,
    rows,
    max_blocks,
    scale,  # times log2 e: the softmax is one of powers of 2
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_M: tl.constexpr,  # TILE_ROWS * GROUP_PADDED, at least MIN_DOT
    TILE_KEYS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,  # a multiple of TILE_KEYS
    DOUBLINGS: tl.constexpr,
    PARTS: tl.constexpr,
    OWN_LAG: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """partial, maxima and sums of one split. Line m of a tile is a query head of a row, see below."""
    wait_for_kernel_before(DEPENDENT)
    first = tl.program_id(0) * TILE_ROWS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    last = tl.minimum(first + TILE_ROWS, rows)
    capacity = max_blocks * BLOCK_SIZE
    # Line m of the tile is query head kv_head * GROUP + m % GROUP_PADDED of row first + m // GROUP_PADDED.
    m = tl.arange(0, TILE_M)
    row = first + m // GROUP_PADDED
    row_ok = row < last
    row_sequence = tl.load(row_sequences + row, mask=row_ok, other=-1)
    row_prefix = tl.load(prefix_lengths + row, mask=row_ok, other=0)
    row_end, _, split_keys = row_cuts(
        row_prefix, masks, row, row_ok, WORDS, LEAST_SPLIT, DOUBLINGS, PARTS, OWN_LAG
    )  # fmt: skip
    row_start = split * split_keys
    # Of a row the splits that hold entries before its end are read, and no others.
    if tl.max(tl.where(row_ok, row_end - row_start, 0), axis=0) > 0:
        row_stop = tl.minimum(row_end, row_start + split_keys)
        head = kv_head * GROUP + m % GROUP_PADDED
        line_ok = row_ok & (m % GROUP_PADDED < GROUP)
        dim = tl.arange(0, DIM_PADDED)
        line = row.to(tl.int64) * (KV_HEADS * GROUP) + head
        place = line[:, None] * HEAD_DIM + dim[None, :]
        place_ok = line_ok[:, None] & (dim[None, :] < HEAD_DIM)
        q = tl.load(query + place, mask=place_ok, other=0.0)
        maximum = tl.full([TILE_M], float("-inf"), tl.float32)
        lanes = tl.zeros([TILE_M, TILE_KEYS], tl.float32)
        accumulator = tl.zeros([TILE_M, DIM_PADDED], tl.float32)
        k = tl.arange(0, TILE_KEYS)

        # A tile may touch several sequences; the lines of the others see nothing meanwhile and keep their state.
        current = first
        while current < last:
            sequence = tl.load(row_sequences + current)
            in_sequence = row_ok & (row_sequence == sequence)
            table = block_tables + sequence.to(tl.int64) * max_blocks
            active = in_sequence & (row_start < row_end)
            start = tl.min(tl.where(active, row_start, capacity), axis=0)
            latest = tl.max(tl.where(active, row_start, 0), axis=0)
            least = tl.min(tl.where(active, row_stop, capacity), axis=0)
            stop = tl.minimum(tl.max(tl.where(active, row_stop, 0), axis=0), capacity)
            # Whole tiles of which every active line sees every entry. Not where the lines' splits differ.
            shared = tl.where(start == latest, start + tl.maximum(least - start, 0) // TILE_KEYS * TILE_KEYS, start)
            # Of the next tile, so that loads of keys wait for no other load and several tiles are under way.
            slot = slots_of(table, start + k, start + k < shared, BLOCK_SIZE)
            for tile in range(start, shared, TILE_KEYS):
                behind = tile + TILE_KEYS + k
                next_slot = slots_of(table, behind, behind < shared, BLOCK_SIZE)
                maximum, lanes, accumulator = _absorb_tile(
                    q, keys, values, slot, tile + k < shared, active[:, None], scale, maximum, lanes, accumulator,
                    kv_head, KV_HEADS, HEAD_DIM, DIM_PADDED,
                )  # fmt: skip
                slot = next_slot
            for tile in range(shared, stop, TILE_KEYS):
                entry = tile + k
                visible = (entry[None, :] >= row_start[:, None]) & (entry[None, :] < row_stop[:, None])
                slot = slots_of(table, entry, entry < stop, BLOCK_SIZE)
                maximum, lanes, accumulator = _absorb_tile(
                    q, keys, values, slot, entry < stop, visible & active[:, None], scale, maximum, lanes, accumulator,
                    kv_head, KV_HEADS, HEAD_DIM, DIM_PADDED,
                )  # fmt: skip
            current += tl.sum((tl.where(in_sequence, 1, 0) * (m % GROUP_PADDED == 0).to(tl.int32)), axis=0)

        lines = split.to(tl.int64) * rows * (KV_HEADS * GROUP)
        tl.store(partial + lines * HEAD_DIM + place, accumulator, mask=place_ok)
        tl.store(maxima + lines + line, maximum * scale, mask=line_ok)
        tl.store(sums + lines + line, _in_any_order(lanes), mask=line_ok)
