"""Attention of tree nodes and prompt tokens over a paged cache; `kernels.blocks.TreeAttention` is the contract."""
