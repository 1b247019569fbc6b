"""Tree attention on the CPU."""

from __future__ import annotations

from ctypes import byref

import torch

from kernels.blocks import check_tensor, check_visibility
from kernels.native.shared_library import load
from kernels.native.structures import AttentionBatchStruct, pointer

KV_DTYPES = (torch.float32, torch.bfloat16)


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
) -> torch.Tensor:
    """See `kernels.blocks.TreeAttention`. query is float32, the cache float32 or bfloat16, the result float32.

    The visible entries of a row are reduced in logical order, and nothing else enters: a tree node and the same token
    at the end of a plain sequence get the same bits.
    """
    check_visibility(block_tables, block_size, row_sequences, prefix_lengths, masks)
    rows = row_sequences.shape[0]
    check_tensor("query", query, (rows, None, None), torch.float32)
    _, heads, head_dim = query.shape
    check_tensor("keys", keys, (None, None, head_dim))
    kv_heads = keys.shape[1]
    check_tensor("values", values, tuple(keys.shape), keys.dtype)
    if keys.dtype not in KV_DTYPES or heads % kv_heads:
        raise ValueError(f"{heads} heads, cache of {kv_heads} and {keys.dtype}; it is {KV_DTYPES} of a divisor")
    batch = AttentionBatchStruct(
        block_tables=pointer(block_tables),
        max_blocks=block_tables.shape[1],
        block_size=block_size,
        row_sequences=pointer(row_sequences),
        prefix_lengths=pointer(prefix_lengths),
        masks=pointer(masks),
        words=masks.shape[1],
        rows=rows,
    )
    out = torch.empty_like(query)
    load().specserve_tree_attention(
        byref(batch),
        pointer(query),
        pointer(keys),
        pointer(values),
        int(keys.dtype == torch.bfloat16),
        heads,
        kv_heads,
        head_dim,
        scale,
        pointer(out),
    )
    return out
