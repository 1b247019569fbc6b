"""The halves of a decoder layer as a sequence of PyTorch operations, on any device.

They are what the native blocks are tested against, and what runs on CUDA around the Triton kernels.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.blocks import AttentionBatch, AttentionWeights, MlpWeights, TreeAttention


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019), computed in float32.

    hidden: [..., size]; weight: [size]. The weight multiplies the normalised value after its rounding to hidden's type.
    """
    wide = hidden.float()
    # x / sqrt(mean(x²) + eps)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(hidden.dtype) * normed.to(hidden.dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021) on pairs (d, d + head_dim / 2).

    heads: [rows, heads, head_dim]; cos, sin: float32 [rows, head_dim / 2].
    """
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


class TorchLinear:
    """x [rows, in] -> x weightᵀ + bias, [rows, out], in `dtype`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class TorchAttentionBlock:
    """`kernels.blocks.AttentionBlock` in `dtype`, around any implementation of tree attention."""

    def __init__(self, weights: AttentionWeights, dtype: torch.dtype, tree_attention: TreeAttention) -> None:
        self._weights = weights
        self._qkv = TorchLinear(weights.qkv, weights.qkv_bias, dtype)
        self._output = TorchLinear(weights.output, weights.output_bias, dtype)
        self._tree_attention = tree_attention

    def __call__(
        self, hidden: torch.Tensor, kv: torch.Tensor, batch: AttentionBatch, *, residual: bool = False
    ) -> torch.Tensor:
        query, key, value = self._project(hidden)
        query, key = rotate(query, batch.cos, batch.sin), rotate(key, batch.cos, batch.sin)
        keys, values = kv[0], kv[1]
        keys.index_copy_(0, batch.slots, key.to(kv.dtype))
        values.index_copy_(0, batch.slots, value.to(kv.dtype))
        attended = self._tree_attention(
            query,
            keys,
            values,
            batch.block_tables,
            batch.block_size,
            batch.row_sequences,
            batch.prefix_lengths,
            batch.masks,
            self._weights.softmax_scale,
        )
        output = self._output(attended.flatten(1))
        return hidden + output if residual else output

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = self._weights
        qkv = self._qkv(rms_norm(hidden, weights.norm, weights.norm_eps))
        heads = qkv.view(len(hidden), -1, weights.head_dim)
        query, key, value = torch.split(heads, [weights.heads, weights.kv_heads, weights.kv_heads], dim=1)
        if weights.query_norm is not None and weights.key_norm is not None:
            query = rms_norm(query, weights.query_norm, weights.norm_eps)
            key = rms_norm(key, weights.key_norm, weights.norm_eps)
        return query, key, value


class TorchMlpBlock:
    """`kernels.blocks.MlpBlock` in `dtype`: down(silu(gate(x)) * up(x)) with x = rms_norm(hidden)."""

    def __init__(self, weights: MlpWeights, dtype: torch.dtype) -> None:
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._gate_up = TorchLinear(weights.gate_up, None, dtype)
        self._down = TorchLinear(weights.down, None, dtype)

    def __call__(self, hidden: torch.Tensor, *, residual: bool = False) -> torch.Tensor:
        gate, up = self._gate_up(rms_norm(hidden, self._norm, self._norm_eps)).chunk(2, dim=-1)
        output = self._down(functional.silu(gate) * up)
        return hidden + output if residual else output
