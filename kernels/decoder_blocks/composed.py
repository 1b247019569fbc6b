"""The halves of a decoder layer as a sequence of one backend's operations, its own kernels or PyTorch's, on any device.

With PyTorch's they are what the native blocks are tested against.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch

from kernels.blocks import (
    AttentionBatch,
    AttentionWeights,
    HeadNorms,
    MakeGatedLinear,
    MakeLinear,
    MlpWeights,
    RmsNorm,
    RotatedWrite,
    TreeAttention,
)


@dataclass(frozen=True)
class Operations:
    """What a layer is made of."""

    make_linear: MakeLinear
    make_gated_linear: MakeGatedLinear
    rms_norm: RmsNorm
    rotated_write: RotatedWrite
    tree_attention: TreeAttention


class ComposedHead:
    """`kernels.blocks.Head` in `dtype`.

    Logits of 10 that are rounded to bfloat16 stand 1/16 apart: the best two would often be equal, and chance would
    choose.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, operations: Operations) -> None:
        self._linear = operations.make_linear(weight, None, dtype)

    def __call__(self, normed: torch.Tensor, /) -> torch.Tensor:
        return self._linear.unrounded(normed)


class ComposedAttentionBlock:
    """`kernels.blocks.AttentionBlock` in `dtype`."""

    def __init__(self, weights: AttentionWeights, dtype: torch.dtype, operations: Operations) -> None:
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._scale = weights.softmax_scale
        self._qkv = operations.make_linear(weights.qkv, weights.qkv_bias, dtype)
        self._output = operations.make_linear(weights.output, weights.output_bias, dtype)
        self._head_norms: HeadNorms | None = None
        if weights.query_norm is not None and weights.key_norm is not None:
            self._head_norms = HeadNorms(weights.query_norm, weights.key_norm, weights.norm_eps)
        self._operations = operations

    def with_attention(self, tree_attention: TreeAttention) -> ComposedAttentionBlock:
        """The same block, sharing its weights, around another attention."""
        other = copy(self)
        other._operations = replace(self._operations, tree_attention=tree_attention)
        return other

    def __call__(
        self, hidden: torch.Tensor, kv: torch.Tensor, batch: AttentionBatch, *, residual: bool = False
    ) -> torch.Tensor:
        qkv = self._qkv(self._operations.rms_norm(hidden, self._norm, self._norm_eps))
        query = self._operations.rotated_write(qkv, kv, batch.slots, batch.cos, batch.sin, self._head_norms)
        attended = self._operations.tree_attention(
            query,
            kv[0],
            kv[1],
            batch.block_tables,
            batch.block_size,
            batch.row_sequences,
            batch.prefix_lengths,
            batch.masks,
            self._scale,
        ).flatten(1)
        return self._output.add_to(hidden, attended) if residual else self._output(attended)


class ComposedMlpBlock:
    """`kernels.blocks.MlpBlock` in `dtype`: down(silu(gate(x)) * up(x)) with x = rms_norm(hidden)."""

    def __init__(self, weights: MlpWeights, dtype: torch.dtype, operations: Operations) -> None:
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._gate_up = operations.make_gated_linear(weights.gate_up, dtype)
        self._down = operations.make_linear(weights.down, None, dtype)
        self._operations = operations

    def __call__(self, hidden: torch.Tensor, *, residual: bool = False) -> torch.Tensor:
        product = self._gate_up(self._operations.rms_norm(hidden, self._norm, self._norm_eps))
        return self._down.add_to(hidden, product) if residual else self._down(product)
