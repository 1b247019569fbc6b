"""Tree attention in plain PyTorch, on any device: the definition that the other two are tested against."""

from __future__ import annotations

import torch

from kernels.blocks import check_visibility


def unpack_masks(masks: torch.Tensor) -> torch.Tensor:
    """int64 [rows, words] -> bool [rows, 64 * words]; column j is bit j."""
    bits = torch.arange(64, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool().flatten(1)


def visible_entries(prefix_lengths: torch.Tensor, masks: torch.Tensor, entries: int) -> torch.Tensor:
    """bool [rows, entries]: the logical entries that each row sees."""
    tree = unpack_masks(masks)
    entry = torch.arange(entries, device=masks.device)
    offset = entry - prefix_lengths[:, None].long()
    in_tree = (offset >= 0) & (offset < tree.shape[1])
    return (offset < 0) | (in_tree & tree.gather(1, offset.clamp(0, tree.shape[1] - 1)))


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
    """See `kernels.blocks.TreeAttention`. Scores and sums are float32 whatever the type of the inputs."""
    check_visibility(block_tables, block_size, row_sequences, prefix_lengths, masks)
    output = torch.zeros_like(query)
    sequences, counts = torch.unique_consecutive(row_sequences, return_counts=True)
    start = 0
    for sequence, count in zip(sequences.tolist(), counts.tolist(), strict=True):
        rows = slice(start, start + count)
        start += count
        visible = visible_entries(prefix_lengths[rows], masks[rows], block_tables.shape[1] * block_size)
        entries = visible.any(0).nonzero().squeeze(1)
        slots = block_tables[sequence, entries // block_size].long() * block_size + entries % block_size
        output[rows] = _attend(query[rows], keys[slots], values[slots], visible[:, entries], scale)
    return output


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [rows, heads, dim], keys and values [entries, kv_heads, dim], visible [rows, entries] -> like query."""
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().view(rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("rkgd,ekd->rkge", grouped, keys.float()) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    # softmax of a row without any entry is NaN; such a row gets zeros.
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible[:, None, None, :], 0.0)
    return torch.einsum("rkge,ekd->rkgd", weights, values.float()).reshape(query.shape).to(query.dtype)
