"""The halves of a decoder layer on the CPU, each one call into the native library.

A row's bits depend on that row, its sequence's cache and the weights alone.
"""

from __future__ import annotations

from ctypes import byref

import torch

from kernels.blocks import AttentionBatch, AttentionWeights, MlpWeights, check_tensor
from kernels.native.memory import PackedMemory
from kernels.native.shared_library import load
from kernels.native.structures import AttentionLayerStruct, MlpLayerStruct, batch_struct, pointer
from kernels.packed_linear.native import NativeLinear
from kernels.tree_attention.native import KV_DTYPES


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """hidden float32 [rows, size], weight [size] -> hidden / sqrt(mean(hidden²) + eps) * weight."""
    check_tensor("hidden", hidden, (None, None), torch.float32)
    weight = weight.float()  # no copy when it is float32
    check_tensor("weight", weight, (hidden.shape[1],))
    out = torch.empty_like(hidden)
    load().specserve_rms_norm(pointer(hidden), pointer(weight), eps, *hidden.shape, pointer(out))
    return out


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous().clone()


class NativeAttentionBlock:
    """`kernels.blocks.AttentionBlock` in float32; the cache is float32 or bfloat16.

    int8, memory: of the matrices, see `NativeLinear`.
    """

    def __init__(self, weights: AttentionWeights, *, int8: bool = False, memory: PackedMemory | None = None) -> None:
        self._library = load()
        self._qkv = NativeLinear(weights.qkv, weights.qkv_bias, int8=int8, memory=memory)
        self._output = NativeLinear(weights.output, weights.output_bias, int8=int8, memory=memory)
        self._norms = [_wide(norm) for norm in (weights.norm, weights.query_norm, weights.key_norm)]
        self._hidden = weights.hidden
        self.kv_shape = (2, None, weights.kv_heads, weights.head_dim)
        self._half_dim = weights.head_dim // 2
        self.struct = AttentionLayerStruct(
            self._qkv.struct,
            self._output.struct,
            *(pointer(norm) for norm in self._norms),
            weights.heads,
            weights.kv_heads,
            weights.head_dim,
            weights.norm_eps,
            weights.softmax_scale,
        )
        self._layer = byref(self.struct)

    def __call__(
        self, hidden: torch.Tensor, kv: torch.Tensor, batch: AttentionBatch, *, residual: bool = False
    ) -> torch.Tensor:
        check_tensor("hidden", hidden, (batch.rows, self._hidden), torch.float32)
        check_tensor("kv", kv, self.kv_shape)
        if kv.dtype not in KV_DTYPES:
            raise ValueError(f"kv is {kv.dtype}; it must be one of {KV_DTYPES}")
        if batch.cos.shape[1] != self._half_dim:
            raise ValueError(f"cos has {batch.cos.shape[1]} columns; half of head_dim is {self._half_dim}")
        out = torch.empty_like(hidden)
        self._library.specserve_attention_block(
            self._layer,
            byref(batch_struct(batch)),
            pointer(hidden),
            pointer(kv),
            kv.shape[1],
            kv.dtype == torch.bfloat16,
            residual,
            pointer(out),
        )
        return out


class NativeMlpBlock:
    """`kernels.blocks.MlpBlock` in float32. int8, memory: of the matrices, see `NativeLinear`."""

    def __init__(self, weights: MlpWeights, *, int8: bool = False, memory: PackedMemory | None = None) -> None:
        self._library = load()
        self._gate_up = NativeLinear(weights.gate_up, int8=int8, gated=True, memory=memory)
        self._down = NativeLinear(weights.down, int8=int8, memory=memory)
        self._norm = _wide(weights.norm)
        self._hidden = weights.hidden
        self.struct = MlpLayerStruct(self._gate_up.struct, self._down.struct, pointer(self._norm), weights.norm_eps)
        self._layer = byref(self.struct)

    def __call__(self, hidden: torch.Tensor, *, residual: bool = False) -> torch.Tensor:
        check_tensor("hidden", hidden, (None, self._hidden), torch.float32)
        out = torch.empty_like(hidden)
        self._library.specserve_mlp_block(self._layer, pointer(hidden), hidden.shape[0], residual, pointer(out))
        return out
