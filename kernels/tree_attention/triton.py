# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Tree attention on the GPU, in Triton.

A program takes a tile of consecutive rows and one key head, with all query heads that share it packed into the tile's
lines, and walks over one split of the keys with an online softmax (FlashAttention-2, Dao, 2023); a second kernel joins
the splits (Flash-Decoding). So the prefix that the nodes of a tree share is read once for all nodes of a tile. A tree
of more lines than a tile, or one that straddles two tiles, has it read again; those programs stand beside each other in
the grid and find it in the L2 cache.

Batch invariance. Logical entry e belongs to split e // split_keys, and within it to tile e // tile_keys; the second is
the model's, the first also follows from the length of the row's own prefix (`tiling.py`). Splits are joined in chunks
of one size, with the shares of the row's own maximum, and an entry that a row does not see changes none of its sums. So
the order of a row's sums is a function of what the row sees alone. The height of a tile does follow the batch; what a
tensor core adds up inside one instruction may differ between the instructions that the compiler picks for tiles of
different heights.

The launch follows from shapes alone: nothing is read back from the device, so that it can be captured in a graph.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.blocks import check_visibility
from kernels.tree_attention.tiling import MIN_DOT, Tiling, choose_tiling, power_of_two, stages, warps

LOG2_E = math.log2(math.e)
# Splits that are read at a time when they are joined; the same for all batches, as it decides the order of a sum.
JOIN_CHUNK = 32
COMPILER_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _mask_word(masks, row, word, ok, WORDS: tl.constexpr):
    """uint64 [M]: a word of each row's mask, 0 outside of it."""
    inside = ok & (word >= 0) & (word < WORDS)
    return tl.load(masks + row.to(tl.int64) * WORDS + word, mask=inside, other=0).to(tl.uint64, bitcast=True)


@triton.jit
def _mask_window(tile, prefix, masks, row, row_ok, WORDS: tl.constexpr):
    """uint64 [M]: bit k says whether the mask of a row shows it logical entry tile + k, for k < 64."""
    # Entry tile + k is bit offset + k of the mask: in one of two words, which are shifted into place.
    offset = tile - prefix
    word = offset >> 6
    shift = (offset & 63).to(tl.uint64)
    low = _mask_word(masks, row, word, row_ok, WORDS) >> shift
    high = tl.where(shift == 0, 0, _mask_word(masks, row, word + 1, row_ok, WORDS) << ((64 - shift) & 63))
    return low | high


@triton.jit
def _either(first, second):
    return first | second


@triton.jit
def _shows(window, ahead, TILE_KEYS: tl.constexpr):
    """bool [M, TILE_KEYS]: whether bit k of the window [M] is set or k < ahead [M]; TILE_KEYS is at most 64."""
    # In halves of 32 bits: elements of 64 would cost the kernel's registers twice.
    k = tl.arange(0, TILE_KEYS)[None, :]
    half = tl.where(k < 32, window.to(tl.uint32)[:, None], (window >> 32).to(tl.uint32)[:, None])
    return (k < ahead[:, None]) | (((half >> (k & 31).to(tl.uint32)) & 1) == 1)


@triton.jit
def _row_ends(
    prefix,  # int32 [M], of each row
    masks,
    row,
    row_ok,
    WORDS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """int32 [M] each: one past the last entry that a row may see, to the granularity of a mask word, and the keys of
    its splits, see tiling.Splits.
    """
    end = prefix
    split_keys = tl.full(prefix.shape, LEAST_SPLIT, tl.int32)
    for word in tl.static_range(WORDS):
        bits = tl.load(masks + row.to(tl.int64) * WORDS + word, mask=row_ok, other=0)
        end = tl.where(bits != 0, prefix + 64 * (word + 1), end)
    for _ in tl.static_range(DOUBLINGS):
        split_keys = tl.where((end == prefix) | (split_keys * PARTS < prefix), 2 * split_keys, split_keys)
    return end, split_keys


@triton.jit
def _slots(
    table,  # the sequence's row of block_tables
    entry,
    seen,  # bool [K]: others are not read, their blocks need not exist
    BLOCK_SIZE: tl.constexpr,
):
    """int64 [K]: where the entries stand in the cache."""
    block = tl.load(table + entry // BLOCK_SIZE, mask=seen, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + entry % BLOCK_SIZE


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
    total,
    accumulator,
    kv_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """One step of the online softmax over a tile of keys."""
    dim = tl.arange(0, DIM_PADDED)
    place = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    place_ok = seen[:, None] & (dim[None, :] < HEAD_DIM)
    k = tl.load(keys + place, mask=place_ok, other=0.0).to(q.dtype)
    v = tl.load(values + place, mask=place_ok, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    # A line that has seen nothing yet: any finite reference gives 2^-inf = 0.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - reference[:, None])
    decay = tl.exp2(maximum - reference)
    total = total * decay + tl.sum(weights, axis=1)
    accumulator = accumulator * decay[:, None]
    accumulator += tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    return highest, total, accumulator


# Numbers that change from step to step, and where the views of a batch's buffers start, are not specialised on: what is
# compiled for a new one keeps requests waiting for a second.
_UNALIGNED = ["block_tables", "row_sequences", "prefix_lengths", "masks"]


@triton.jit(do_not_specialize=["rows", "max_blocks"], do_not_specialize_on_alignment=_UNALIGNED)
def _tree_attention_kernel(
    query,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    keys,  # [slots, KV_HEADS, HEAD_DIM]
    values,
    block_tables,  # [sequences, max_blocks]
    row_sequences,
    prefix_lengths,
    masks,  # [rows, WORDS]
    out,  # like query, or float32 [splits, rows, heads, HEAD_DIM], not yet divided by the sums
    maxima,  # float32 [splits, rows, heads], with several splits
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
    JOINED: tl.constexpr,  # whether there may be several splits, which _join_splits_kernel joins
):
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
    row_end, split_keys = _row_ends(row_prefix, masks, row, row_ok, WORDS, LEAST_SPLIT, DOUBLINGS, PARTS)
    row_start = split * split_keys
    # The joining kernel reads of a row the splits that hold entries before its end, and no others.
    if JOINED & (tl.max(tl.where(row_ok, row_end - row_start, 0), axis=0) <= 0):
        return
    row_stop = tl.minimum(row_end, row_start + split_keys)

    head = kv_head * GROUP + m % GROUP_PADDED
    line_ok = row_ok & (m % GROUP_PADDED < GROUP)
    dim = tl.arange(0, DIM_PADDED)
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + head
    place = line[:, None] * HEAD_DIM + dim[None, :]
    place_ok = line_ok[:, None] & (dim[None, :] < HEAD_DIM)
    q = tl.load(query + place, mask=place_ok, other=0.0)
    maximum = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, DIM_PADDED], tl.float32)

    # A tile may touch several sequences; the lines of the others see nothing meanwhile and keep their state.
    current = first
    while current < last:
        sequence = tl.load(row_sequences + current)
        in_sequence = row_ok & (row_sequence == sequence)
        table = block_tables + sequence.to(tl.int64) * max_blocks
        prefix = tl.where(in_sequence, row_prefix, 0)
        active = in_sequence & (row_start < row_end)
        start = tl.min(tl.where(active, row_start, capacity), axis=0)
        latest = tl.max(tl.where(active, row_start, 0), axis=0)
        stop = tl.minimum(tl.max(tl.where(active, row_stop, 0), axis=0), capacity)
        # Whole tiles before the shortest prefix: every active line sees every entry, and no mask is read. Not where the
        # lines' splits differ.
        shared = tl.min(tl.where(active, row_prefix, capacity), axis=0)
        shared = tl.maximum(start, tl.minimum(shared, stop) // TILE_KEYS * TILE_KEYS)
        shared = tl.where(start == latest, shared, start)
        k = tl.arange(0, TILE_KEYS)
        # Of the next tile, so that loads of keys wait for no other load and several tiles are under way.
        slot = _slots(table, start + k, start + k < shared, BLOCK_SIZE)
        for tile in range(start, shared, TILE_KEYS):
            behind = tile + TILE_KEYS + k
            next_slot = _slots(table, behind, behind < shared, BLOCK_SIZE)
            maximum, total, accumulator = _absorb_tile(
                q, keys, values, slot, tile + k < shared, active[:, None], scale, maximum, total, accumulator,
                kv_head, KV_HEADS, HEAD_DIM, DIM_PADDED,
            )  # fmt: skip
            slot = next_slot
        for tile in range(shared, stop, TILE_KEYS):
            entry = tile + k
            window = _mask_window(tile, prefix, masks, row, in_sequence, WORDS)
            visible = _shows(window, prefix - tile, TILE_KEYS)
            visible &= (entry[None, :] >= row_start[:, None]) & (entry[None, :] < row_stop[:, None])
            shown = tl.reduce(window, 0, _either) >> k.to(tl.uint64) & 1
            seen = ((shown == 1) | (entry < tl.max(prefix, axis=0))) & (entry < stop)
            slot = _slots(table, entry, seen, BLOCK_SIZE)
            maximum, total, accumulator = _absorb_tile(
                q, keys, values, slot, seen, visible, scale, maximum, total, accumulator,
                kv_head, KV_HEADS, HEAD_DIM, DIM_PADDED,
            )  # fmt: skip
        current += tl.sum((tl.where(in_sequence, 1, 0) * (m % GROUP_PADDED == 0).to(tl.int32)), axis=0)

    if JOINED:
        lines = split.to(tl.int64) * rows * (KV_HEADS * GROUP)
        tl.store(out + lines * HEAD_DIM + place, accumulator, mask=place_ok)
        tl.store(maxima + lines + line, maximum, mask=line_ok)
        tl.store(sums + lines + line, total, mask=line_ok)
    else:
        accumulator = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + place, accumulator.to(out.dtype.element_ty), mask=place_ok)


@triton.jit(do_not_specialize=["rows", "max_splits"], do_not_specialize_on_alignment=["prefix_lengths", "masks"])
def _join_splits_kernel(
    partial,  # float32 [splits, rows, heads, HEAD_DIM]
    maxima,  # float32 [splits, rows, heads]
    sums,
    prefix_lengths,
    masks,
    out,  # [rows, heads, HEAD_DIM]
    rows,
    heads,
    max_splits,
    WORDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    lines = rows.to(tl.int64) * heads
    line = row.to(tl.int64) * heads + tl.program_id(1)
    prefix = tl.load(prefix_lengths + row + tl.arange(0, 1))
    end, split_keys = _row_ends(prefix, masks, row + tl.arange(0, 1), True, WORDS, LEAST_SPLIT, DOUBLINGS, PARTS)
    splits = tl.minimum(tl.max((end + split_keys - 1) // split_keys, axis=0), max_splits)
    dim = tl.arange(0, DIM_PADDED)
    highest = float("-inf")
    total = 0.0
    joined = tl.zeros([DIM_PADDED], tl.float32)
    # out = Σ 2^(max_s - max) acc_s / Σ 2^(max_s - max) sum_s, a chunk of splits at a time
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        there = split < splits
        place = split * lines + line
        maximum = tl.load(maxima + place, mask=there, other=float("-inf"))
        own = tl.load(sums + place, mask=there, other=0.0)
        place_ok = there[:, None] & (dim[None, :] < HEAD_DIM)
        results = tl.load(partial + place[:, None] * HEAD_DIM + dim[None, :], mask=place_ok, other=0.0)
        higher = tl.maximum(highest, tl.max(maximum, axis=0))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        share, decay = tl.exp2(maximum - reference), tl.exp2(highest - reference)
        total = total * decay + tl.sum(share * own, axis=0)
        joined = joined * decay + tl.sum(share[:, None] * results, axis=0)
        highest = higher
    joined = joined / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    row_sequences: torch.Tensor,
    prefix_lengths: torch.Tensor,
    masks: torch.Tensor,
    scale: float,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """See `kernels.blocks.TreeAttention`. float32, bfloat16 or float16; scores and sums are float32.

    tiling: None chooses by shape.
    """
    check_visibility(block_tables, block_size, row_sequences, prefix_lengths, masks)
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(query)
    if rows == 0:
        return out
    sequences, max_blocks = block_tables.shape
    dim_padded = max(MIN_DOT, power_of_two(head_dim))
    tiling = tiling or choose_tiling(rows, sequences, heads, kv_heads, dim_padded * query.element_size())
    group_padded = power_of_two(heads // kv_heads)
    tile_lines = max(MIN_DOT, tiling.tile_rows * group_padded)
    splits = tiling.splits.most_splits(max_blocks * block_size, masks.shape[1])
    # Also a short context's only split, where longer ones have several: one program for both.
    joined = splits > 1 or tiling.splits.doublings > 0
    split_rule = {
        "LEAST_SPLIT": tiling.splits.least,
        "DOUBLINGS": tiling.splits.doublings,
        "PARTS": tiling.splits.parts,
    }
    if not joined:
        partial = maxima = sums = out
    else:
        partial = torch.empty(splits, rows, heads, head_dim, dtype=torch.float32, device=query.device)
        maxima, sums = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=query.device)
    _tree_attention_kernel[(triton.cdiv(rows, tiling.tile_rows), kv_heads, splits)](
        query,
        keys,
        values,
        block_tables,
        row_sequences,
        prefix_lengths,
        masks,
        partial,
        maxima,
        sums,
        rows,
        max_blocks,
        scale * LOG2_E,
        BLOCK_SIZE=block_size,
        WORDS=masks.shape[1],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PADDED=group_padded,
        HEAD_DIM=head_dim,
        DIM_PADDED=dim_padded,
        TILE_ROWS=tiling.tile_rows,
        TILE_M=tile_lines,
        TILE_KEYS=tiling.tile_keys,
        JOINED=joined,
        num_warps=warps(tile_lines),
        num_stages=stages(query.element_size()),
        **split_rule,
        **COMPILER_OPTIONS,
    )
    if joined:
        _join_splits_kernel[(rows, heads)](
            partial,
            maxima,
            sums,
            prefix_lengths,
            masks,
            out,
            rows,
            heads,
            splits,
            WORDS=masks.shape[1],
            HEAD_DIM=head_dim,
            DIM_PADDED=dim_padded,
            CHUNK=JOIN_CHUNK,
            **split_rule,
            **COMPILER_OPTIONS,
        )
    return out
