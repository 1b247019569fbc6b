# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Tree attention on the GPU, in Triton.

A program takes a tile of consecutive rows and one key head, with all query heads that share it, and walks over the keys
of the tile's sequences with an online softmax (FlashAttention-2, Dao, 2023). Where that gives too few programs, the
keys are split among several whose partial results a second kernel joins (Flash-Decoding). The choice follows from
shapes alone: nothing is read back from the device, so that the launch can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.blocks import check_visibility

# tl.dot wants at least this many rows, columns and summands.
MIN_DOT = 16
MAX_TILE = 64
MAX_SPLITS = 16
# Tiles of keys below which another split does not pay.
MIN_TILES_IN_SPLIT = 4
# Bytes of a tile of keys, and half the bytes of a tile of queries. With two stages of loads ahead, they fit the shared
# memory of every GPU since Ampere (99 KiB).
TILE_BYTES = 16384
COMPILER_OPTIONS = {"num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def _visible(entry, prefix, masks, row, row_ok, WORDS: tl.constexpr):
    """bool [M, K]: which of the logical entries [K] the rows [M] see."""
    offset = entry[None, :] - prefix[:, None]
    in_tree = (offset >= 0) & (offset < 64 * WORDS) & row_ok[:, None]
    offset = tl.where(in_tree, offset, 0)
    word = tl.load(masks + row[:, None].to(tl.int64) * WORDS + offset // 64, mask=in_tree, other=0)
    bit = (word >> (offset % 64).to(tl.int64)) & 1
    return (entry[None, :] < prefix[:, None]) | (in_tree & (bit == 1))


@triton.jit
def _end_of_keys(prefix, masks, row, row_ok, WORDS: tl.constexpr):
    """One past the last logical entry that any of the rows may see, to the granularity of a mask word."""
    end = prefix
    for word in tl.static_range(WORDS):
        bits = tl.load(masks + row.to(tl.int64) * WORDS + word, mask=row_ok, other=0)
        end = tl.where(bits != 0, prefix + 64 * (word + 1), end)
    return tl.max(tl.where(row_ok, end, 0), axis=0)


@triton.jit
def _tree_attention_kernel(
    query,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    keys,  # [slots, KV_HEADS, HEAD_DIM]
    values,
    block_tables,  # [sequences, max_blocks]
    row_sequences,
    prefix_lengths,
    masks,  # [rows, WORDS]
    out,  # like query, or float32 [SPLITS, rows, heads, HEAD_DIM], not yet divided by the sums
    maxima,  # float32 [SPLITS, rows, heads], with several splits
    sums,
    rows,
    max_blocks,
    scale,
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
    SPLITS: tl.constexpr,
):
    first = tl.program_id(0) * TILE_ROWS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    last = tl.minimum(first + TILE_ROWS, rows)

    # Line m of the tile is query head kv_head * GROUP + m % GROUP_PADDED of row first + m // GROUP_PADDED.
    m = tl.arange(0, TILE_M)
    row = first + m // GROUP_PADDED
    row_ok = row < last
    head = kv_head * GROUP + m % GROUP_PADDED
    line_ok = row_ok & (m % GROUP_PADDED < GROUP)
    dim = tl.arange(0, DIM_PADDED)
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + head
    place = line[:, None] * HEAD_DIM + dim[None, :]
    place_ok = line_ok[:, None] & (dim[None, :] < HEAD_DIM)

    q = tl.load(query + place, mask=place_ok, other=0.0)
    row_sequence = tl.load(row_sequences + row, mask=row_ok, other=-1)
    row_prefix = tl.load(prefix_lengths + row, mask=row_ok, other=0)
    maximum = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, DIM_PADDED], tl.float32)

    # A tile may touch several sequences; the lines of the others see nothing meanwhile and keep their state.
    current = first
    while current < last:
        sequence = tl.load(row_sequences + current)
        in_sequence = row_ok & (row_sequence == sequence)
        prefix = tl.where(in_sequence, row_prefix, 0)
        end = tl.minimum(_end_of_keys(prefix, masks, row, in_sequence, WORDS), max_blocks * BLOCK_SIZE)
        tiles = (end + TILE_KEYS - 1) // TILE_KEYS
        tiles_in_split = (tiles + SPLITS - 1) // SPLITS
        stop = tl.minimum(tiles, (split + 1) * tiles_in_split)
        for tile in range(split * tiles_in_split, stop):
            entry = tile * TILE_KEYS + tl.arange(0, TILE_KEYS)
            visible = _visible(entry, prefix, masks, row, in_sequence, WORDS) & (entry[None, :] < end)
            # Entries that no line sees are not read: they may hold NaN, and their blocks need not exist.
            seen = tl.max(visible.to(tl.int32), axis=0) > 0
            block = tl.load(block_tables + sequence.to(tl.int64) * max_blocks + entry // BLOCK_SIZE, mask=seen, other=0)
            slot = block.to(tl.int64) * BLOCK_SIZE + entry % BLOCK_SIZE
            kv_place = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
            kv_ok = seen[:, None] & (dim[None, :] < HEAD_DIM)
            k = tl.load(keys + kv_place, mask=kv_ok, other=0.0).to(q.dtype)
            v = tl.load(values + kv_place, mask=kv_ok, other=0.0).to(q.dtype)

            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(visible, scores, float("-inf"))
            highest = tl.maximum(maximum, tl.max(scores, axis=1))
            # A line that has seen nothing yet: any finite reference gives e^-inf = 0.
            reference = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp(scores - reference[:, None])
            decay = tl.exp(maximum - reference)
            total = total * decay + tl.sum(weights, axis=1)
            accumulator = accumulator * decay[:, None]
            accumulator += tl.dot(weights.to(q.dtype), v, input_precision="ieee")
            maximum = highest
        current += tl.sum((tl.where(in_sequence, 1, 0) * (m % GROUP_PADDED == 0).to(tl.int32)), axis=0)

    if SPLITS == 1:
        accumulator = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + place, accumulator.to(out.dtype.element_ty), mask=place_ok)
    else:
        lines = split.to(tl.int64) * rows * (KV_HEADS * GROUP)
        tl.store(out + lines * HEAD_DIM + place, accumulator, mask=place_ok)
        tl.store(maxima + lines + line, maximum, mask=line_ok)
        tl.store(sums + lines + line, total, mask=line_ok)


@triton.jit
def _join_splits_kernel(
    partial,  # float32 [SPLITS, lines, HEAD_DIM]
    maxima,  # float32 [SPLITS, lines]
    sums,
    out,  # [lines, HEAD_DIM]
    lines,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
):
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_PADDED)
    maximum = tl.load(maxima + split * lines + line)
    total = tl.load(sums + split * lines + line)
    highest = tl.max(maximum, axis=0)
    # out = Σ e^(max_s - max) acc_s / Σ e^(max_s - max) sum_s
    share = tl.exp(maximum - tl.where(highest == float("-inf"), 0.0, highest))
    place = (split[:, None] * lines + line) * HEAD_DIM + dim[None, :]
    parts = tl.load(partial + place, mask=dim[None, :] < HEAD_DIM, other=0.0)
    total = tl.sum(share * total, axis=0)
    joined = tl.sum(parts * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: rows and keys of a tile, and among how many programs the keys of a row are split."""

    tile_rows: int
    tile_keys: int
    splits: int


def choose_tiling(
    rows: int, sequences: int, heads: int, kv_heads: int, line_bytes: int, capacity: int, processors: int
) -> Tiling:
    """Tiles as large as the mean sequence has rows, and splits until every processor has two programs.

    line_bytes: size of one head of one key, padded. capacity: entries that a block table has room for.
    """
    group = triton.next_power_of_2(heads // kv_heads)
    mean_rows = triton.next_power_of_2(triton.cdiv(rows, max(1, sequences)))
    tile_lines = max(MIN_DOT, min(MAX_TILE, 2 * TILE_BYTES // line_bytes))
    tile_rows = max(1, min(mean_rows, tile_lines // group))
    tile_keys = max(MIN_DOT, min(MAX_TILE, TILE_BYTES // line_bytes))
    programs = triton.cdiv(rows, tile_rows) * kv_heads
    most = min(MAX_SPLITS, triton.cdiv(capacity, tile_keys * MIN_TILES_IN_SPLIT))
    splits = 1
    while splits * 2 <= most and programs * splits < 2 * processors:
        splits *= 2
    return Tiling(tile_rows, tile_keys, splits)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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

    tiling: None chooses by shape; the split of the keys, and with it the rounding, then follows the batch's shape.
    """
    check_visibility(block_tables, block_size, row_sequences, prefix_lengths, masks)
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(query)
    if rows == 0:
        return out
    sequences, max_blocks = block_tables.shape
    dim_padded = max(MIN_DOT, triton.next_power_of_2(head_dim))
    line_bytes, capacity = dim_padded * query.element_size(), max_blocks * block_size
    tiling = tiling or choose_tiling(rows, sequences, heads, kv_heads, line_bytes, capacity, _processors(query.device))
    splits, group_padded = tiling.splits, triton.next_power_of_2(heads // kv_heads)
    if splits == 1:
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
        scale,
        BLOCK_SIZE=block_size,
        WORDS=masks.shape[1],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PADDED=group_padded,
        HEAD_DIM=head_dim,
        DIM_PADDED=dim_padded,
        TILE_ROWS=tiling.tile_rows,
        TILE_M=max(MIN_DOT, tiling.tile_rows * group_padded),
        TILE_KEYS=tiling.tile_keys,
        SPLITS=splits,
        **COMPILER_OPTIONS,
    )
    if splits > 1:
        lines = rows * heads
        _join_splits_kernel[(lines,)](
            partial,
            maxima,
            sums,
            out,
            lines,
            HEAD_DIM=head_dim,
            DIM_PADDED=dim_padded,
            SPLITS=splits,
            **COMPILER_OPTIONS,
        )
    return out
