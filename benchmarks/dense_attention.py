"""What PyTorch offers for a tree: scaled_dot_product_attention with a dense mask, and flex attention.

Both know no block tables: they get one sequence whose logical entry e lives in slot e, and read its entries where they
lie, so that no gathering is counted against them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kernels.blocks import TreeAttention
from kernels.tree_attention.reference import visible_entries

BLOCK_SIZE = 16

# query [1, heads, nodes, dim], keys and values [1, kv_heads, entries, dim] -> like query
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Tree:
    """A binary tree of `nodes` behind `context` entries of one sequence, as `kernels.blocks.AttentionBatch` has it."""

    context: int
    nodes: int
    block_tables: torch.Tensor
    row_sequences: torch.Tensor
    prefix_lengths: torch.Tensor
    masks: torch.Tensor

    @classmethod
    def binary(cls, context: int, nodes: int, device: torch.device) -> Tree:
        masks = ancestor_masks(nodes)
        signed = [mask - 2**64 if mask >= 2**63 else mask for mask in masks]
        blocks = -(-(context + nodes) // BLOCK_SIZE)
        return cls(
            context,
            nodes,
            torch.arange(blocks, dtype=torch.int32, device=device)[None],
            torch.zeros(nodes, dtype=torch.int32, device=device),
            torch.full((nodes,), context, dtype=torch.int32, device=device),
            torch.tensor(signed, dtype=torch.int64, device=device)[:, None],
        )

    @property
    def entries(self) -> int:
        return self.context + self.nodes

    def visible(self) -> torch.Tensor:
        """bool [nodes, entries]."""
        return visible_entries(self.prefix_lengths, self.masks, self.entries)

    def attend(
        self, attention: TreeAttention, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """query [nodes, heads, dim]; keys, values [slots, kv_heads, dim]."""
        rows = self.row_sequences, self.prefix_lengths, self.masks
        scale: float = query.shape[-1] ** -0.5
        return attention(query, keys, values, self.block_tables, BLOCK_SIZE, *rows, scale)


def ancestor_masks(nodes: int) -> list[int]:
    """Bit masks of a binary tree in level order, of at most 64 nodes."""
    masks = [1]
    for node in range(1, nodes):
        masks.append(masks[(node - 1) // 2] | 1 << node)
    return masks


def sdpa(tree: Tree) -> TreeAttention:
    """With a dense mask, [nodes, entries]."""
    visible = tree.visible()

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)

    return _dense(tree, attend)


def flex(tree: Tree) -> TreeAttention:
    """With the mask as a block mask; compiled on CUDA, in its slow eager form elsewhere."""
    visible = tree.visible()
    device = visible.device

    def sees(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        return visible[row, entry]

    blocks = create_block_mask(sees, None, None, tree.nodes, tree.entries, device=str(device))
    torch.compiler.reset()  # what was compiled for other trees counts towards a limit, beyond which nothing is
    compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        output: torch.Tensor = compiled(query, keys, values, block_mask=blocks, scale=scale, enable_gqa=True)
        return output

    return _dense(tree, attend)


def _dense(tree: Tree, attend: Attend) -> TreeAttention:
    def attention(
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
        key, value = (cache[: tree.entries].transpose(0, 1)[None] for cache in (keys, values))
        return attend(query.transpose(0, 1)[None], key, value, scale)[0].transpose(0, 1).contiguous()

    return attention
