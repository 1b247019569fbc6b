"""The halves of a decoder layer as a sequence of operations, on any device: matrix products of PyTorch, and around them
the operations of one backend, its own kernels or PyTorch's.

With PyTorch's they are what the native blocks are tested against.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from kernels.blocks import (
    AttentionBatch,
    AttentionWeights,
    GatedProduct,
    HeadNorms,
    MlpWeights,
    RmsNorm,
    RotatedWrite,
    TreeAttention,
)


@dataclass(frozen=True)
class Operations:
    """What stands between the matrix products."""

    rms_norm: RmsNorm
    rotated_write: RotatedWrite
    tree_attention: TreeAttention
    gated_product: GatedProduct


class ComposedLinear:
    """x [rows, in] -> x weightᵀ + bias, [rows, out], in `dtype`.

    bfloat16 weights multiply x rounded to bfloat16, also where the rest is float32: as the native layer does.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._rounds = weight.dtype == torch.bfloat16 != dtype
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self._rounded(x), self._weight, self._bias)

    def unrounded(self, x: torch.Tensor) -> torch.Tensor:
        """The result in float32, as it was summed."""
        if x.is_cuda and self._weight.dtype != torch.float32 and self._bias is None:
            return torch.mm(self._rounded(x), self._weight.t(), out_dtype=torch.float32)
        return self(x).float()

    def add_to(self, target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """target += x weightᵀ + bias: the residual costs no launch of its own and is rounded once, with the product."""
        if self._bias is not None:
            target.add_(self._bias)
        return target.addmm_(self._rounded(x), self._weight.t())

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().to(x.dtype) if self._rounds else x


class ComposedHead:
    """`kernels.blocks.Head` in `dtype`.

    Logits of 10 that are rounded to bfloat16 stand 1/16 apart: the best two would often be equal, and chance would
    choose.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self._linear = ComposedLinear(weight, None, dtype)

    def __call__(self, normed: torch.Tensor, /) -> torch.Tensor:
        return self._linear.unrounded(normed)


class ComposedAttentionBlock:
    """`kernels.blocks.AttentionBlock` in `dtype`."""

    def __init__(self, weights: AttentionWeights, dtype: torch.dtype, operations: Operations) -> None:
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._scale = weights.softmax_scale
        self._qkv = ComposedLinear(weights.qkv, weights.qkv_bias, dtype)
        self._output = ComposedLinear(weights.output, weights.output_bias, dtype)
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
        self._gate_up = ComposedLinear(weights.gate_up, None, dtype)
        self._down = ComposedLinear(weights.down, None, dtype)
        self._operations = operations

    def __call__(self, hidden: torch.Tensor, *, residual: bool = False) -> torch.Tensor:
        gate_up = self._gate_up(self._operations.rms_norm(hidden, self._norm, self._norm_eps))
        product = self._operations.gated_product(gate_up)
        return self._down.add_to(hidden, product) if residual else self._down(product)
