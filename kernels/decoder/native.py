"""A whole decoder on the CPU: tokens in, hidden states out, without Python between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch

from kernels.blocks import check_tensor, check_visibility
from kernels.decoder_blocks.native import NativeAttentionBlock, NativeMlpBlock
from kernels.native.shared_library import load
from kernels.native.structures import (
    STORAGES,
    AttentionBatchStruct,
    AttentionLayerStruct,
    DecoderStruct,
    KvCacheStruct,
    MlpLayerStruct,
    pointer,
)
from kernels.packed_linear.native import NativeLinear
from kernels.tree_attention.native import KV_DTYPES


class NativeDecoder:
    """The layers, the final norm and the head; the bits are those of its blocks called one after the other.

    blocks: attention and MLP of each layer. norm: the final norm, float32. embedding: [vocab, hidden], float32,
    bfloat16 or float16. cos, sin: float32 [context, head_dim / 2]. All are kept alive here.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[NativeAttentionBlock, NativeMlpBlock]],
        norm: torch.Tensor,
        norm_eps: float,
        head: NativeLinear,
        embedding: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        self._library = load()
        self._keep = (tuple(blocks), norm, head, embedding, cos, sin)
        self._hidden, self._vocab = head.inputs, head.outputs
        self._context, self._layers = cos.shape[0], len(blocks)
        self._head_shape = blocks[0][0].kv_shape[2:]
        self.struct = DecoderStruct(
            (AttentionLayerStruct * len(blocks))(*(block.struct for block, _ in blocks)),
            (MlpLayerStruct * len(blocks))(*(block.struct for _, block in blocks)),
            len(blocks),
            head.struct,
            pointer(norm),
            norm_eps,
            STORAGES[embedding.dtype],
            pointer(embedding),
            pointer(cos),
            pointer(sin),
            self._vocab,
            self._context,
        )
        self._decoder = byref(self.struct)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        row_sequences: torch.Tensor,
        prefix_lengths: torch.Tensor,
        masks: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """The last layer's output, float32 [rows, hidden]; the rows' keys and values are written to the cache.

        token_ids, positions, slots: int64 [rows]. The others as in `kernels.blocks.AttentionBatch`.
        cache: [layers, 2, slots, kv_heads, head_dim], float32 or bfloat16.

        Raises:
            ValueError: shapes or types that do not fit.
            IndexError: a token or a position that the model has not.
        """
        rows = row_sequences.shape[0]
        for name, tensor in (("token_ids", token_ids), ("positions", positions), ("slots", slots)):
            check_tensor(name, tensor, (rows,), torch.int64)
        check_visibility(block_tables, block_size, row_sequences, prefix_lengths, masks)
        batch = AttentionBatchStruct(
            pointer(block_tables),
            block_tables.shape[1],
            block_size,
            pointer(row_sequences),
            pointer(prefix_lengths),
            pointer(masks),
            masks.shape[1],
            pointer(slots),
            None,
            None,
            rows,
        )
        hidden = torch.empty(rows, self._hidden)
        wrong = self._library.specserve_decoder_forward(
            self._decoder,
            byref(self.kv_struct(cache)),
            pointer(token_ids),
            pointer(positions),
            byref(batch),
            pointer(hidden),
        )
        if wrong >= 0:
            raise IndexError(
                f"row {wrong} has token {int(token_ids[wrong])} at position {int(positions[wrong])}; the model has "
                f"{self._vocab} tokens and {self._context} positions"
            )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden float32 [rows, hidden] -> head of its final norm, float32 [rows, vocab]."""
        check_tensor("hidden", hidden, (None, self._hidden), torch.float32)
        logits = torch.empty(hidden.shape[0], self._vocab)
        self._library.specserve_decoder_logits(self._decoder, pointer(hidden), hidden.shape[0], pointer(logits))
        return logits

    def kv_struct(self, cache: torch.Tensor) -> KvCacheStruct:
        """Raises ValueError: the cache has another model's shape, or a type that the kernels do not read."""
        check_tensor("cache", cache, (self._layers, 2, None, *self._head_shape))
        if cache.dtype not in KV_DTYPES:
            raise ValueError(f"cache is {cache.dtype}; it must be one of {KV_DTYPES}")
        return KvCacheStruct(pointer(cache), cache.shape[2], cache.dtype == torch.bfloat16)
