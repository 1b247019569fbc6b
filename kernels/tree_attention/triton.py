"""Tree attention on the GPU, in Triton: two kernels.

The first takes a tile of consecutive rows and one key head, with all query heads that share it packed into the tile's
lines, and walks over one split of the keys with an online softmax (FlashAttention-2, Dao, 2023). So the prefix that the
nodes of a tree share is read once for all nodes of a tile. A tree of more lines than a tile, or one that straddles two
tiles, has it read again; those programs stand beside each other in the grid and find it in the L2 cache. The second
takes the end of what one row sees, its ancestors among it, and joins that and the splits (Flash-Decoding).

Bits. What a row adds up, and in which order, follows from what it sees alone: neither from the other rows of the batch,
nor from where its ancestors stand among the nodes of a tree. Entries are cut by their number among those that the row
sees: the last 16 to 31 are its own, those before belong to split number // split_keys and within it to tile
number // tile_keys. Splits are joined in chunks of one size, with the shares of the row's own maximum, and an entry
that a row does not see changes none of its sums. Sums that would follow the layout of a tile among threads, which its
height decides, are exact; those inside of a tensor core's instruction are the same at all heights, which the tests look
at. So trees of up to OWN_LAG levels, and plain decoding, have the same bits. A prompt's rows are cut otherwise.

The launch follows from shapes alone: nothing is read back from the device, so that it can be captured in a graph.
"""

from __future__ import annotations

import math

import torch
import triton

from kernels.blocks import check_visibility
from kernels.dependent_launch import dependent_launch
from kernels.tree_attention.own_entries_kernel import own_entries_kernel
from kernels.tree_attention.split_kernel import split_kernel
from kernels.tree_attention.tiling import (
    MIN_DOT,
    OWN_LAG,
    Tiling,
    choose_tiling,
    own_warps,
    power_of_two,
    stages,
    warps,
)

LOG2_E = math.log2(math.e)
# Splits that are read at a time when they are joined.
JOIN_CHUNK = 16
COMPILER_OPTIONS = {"enable_fp_fusion": False}


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
    splits = tiling.splits.most_splits(max_blocks * block_size)
    partial = torch.empty(splits, rows, heads, head_dim, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=query.device)
    given = query, keys, values, block_tables, row_sequences, prefix_lengths, masks, partial, maxima, sums
    constants = {
        "BLOCK_SIZE": block_size,
        "WORDS": masks.shape[1],
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "DIM_PADDED": dim_padded,
        "LEAST_SPLIT": tiling.splits.least,
        "DOUBLINGS": tiling.splits.doublings,
        "PARTS": tiling.splits.parts,
        "OWN_LAG": OWN_LAG,
    }
    split_kernel[(triton.cdiv(rows, tiling.tile_rows), kv_heads, splits)](
        *given,
        rows,
        max_blocks,
        scale * LOG2_E,
        GROUP_PADDED=group_padded,
        TILE_ROWS=tiling.tile_rows,
        TILE_M=tile_lines,
        TILE_KEYS=tiling.tile_keys,
        num_warps=warps(tile_lines),
        num_stages=stages(query.element_size()),
        **constants,
        **dependent_launch(query.device),
        **COMPILER_OPTIONS,
    )
    own_entries_kernel[(rows, heads)](
        *given,
        out,
        rows,
        max_blocks,
        splits,
        scale * LOG2_E,
        OWN_KEYS=2 * OWN_LAG,
        CHUNK=JOIN_CHUNK,
        num_warps=own_warps(dim_padded * query.element_size()),
        **constants,
        **dependent_launch(query.device),
        **COMPILER_OPTIONS,
    )
    return out
