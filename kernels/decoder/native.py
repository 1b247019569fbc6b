"""A whole decoder on the CPU: tokens in, logits out, without Python between the layers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import byref
from typing import NamedTuple

import torch

from kernels.blocks import check_tensor
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

_WORD = 64
# Logits that keep their memory: of all steps but those that want a prompt's.
_KEPT_LOGITS = 2**24


class StepRows(NamedTuple):
    """The rows of a step, those of a sequence one behind the other.

    token_ids, positions, slots: of each row; its key and value go into the slot. row_sequences: row of block_tables.
    prefix_lengths: entries before this one are seen. masks: bit j, that entry number j behind them is seen too.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    row_sequences: Sequence[int]
    prefix_lengths: Sequence[int]
    masks: Sequence[int]
    block_tables: Sequence[Sequence[int]]

    def mask_words(self) -> tuple[int, list[int]]:
        """How many words of 64 bits hold the longest mask, at least one; and so many of each row, the lowest first."""
        words = -(-max(self.masks, default=0).bit_length() // _WORD) or 1
        return words, [mask >> _WORD * word & (1 << _WORD) - 1 for mask in self.masks for word in range(words)]

    def padded_tables(self) -> tuple[int, list[int]]:
        """How many blocks the longest table has; and so many of each, zeros behind its own."""
        blocks = max(map(len, self.block_tables))
        return blocks, [block for table in self.block_tables for block in [*table, *[0] * (blocks - len(table))]]


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
        # Each touch of a tensor behind a step costs some microseconds, since its code has left the caches: what a step
        # needs of them is kept.
        self._logits = {0: (torch.empty(0, self._vocab), 0)}  # with their address, by number of rows
        self._caches: tuple[torch.Tensor, KvCacheStruct] | None = None  # the last one that was used

    def step(
        self, rows: StepRows, wanted: Sequence[int], block_size: int, cache: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """Next-token logits of the rows `wanted`, float32 [len(wanted), vocab], and of each the first highest token.

        All rows' keys and values are written. The logits are overwritten by a later step.

        cache: [layers, 2, slots, kv_heads, head_dim], float32 or bfloat16.

        Raises:
            ValueError: another shape or type.
            IndexError: a token or a position that the model has not, or a wanted row that there is not.
        """
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(rows.token_ids):
            raise IndexError(f"rows {min(wanted)}..{max(wanted)} are wanted; there are {len(rows.token_ids)}")
        # The structure holds addresses: these arrays outlive the call.
        words, masks = rows.mask_words()
        blocks, padded = rows.padded_tables()
        tokens, positions, slots, chosen = (
            array("q", numbers) for numbers in (rows.token_ids, rows.positions, rows.slots, wanted)
        )
        sequences, prefixes, tables = (
            array("i", numbers) for numbers in (rows.row_sequences, rows.prefix_lengths, padded)
        )
        seen = array("Q", masks)
        batch = AttentionBatchStruct(
            tables.buffer_info()[0],
            blocks,
            block_size,
            sequences.buffer_info()[0],
            prefixes.buffer_info()[0],
            seen.buffer_info()[0],
            words,
            slots.buffer_info()[0],
            None,
            None,
            len(tokens),
        )
        argmax = array("q", bytes(8 * len(chosen)))
        logits, address = self._room(len(chosen))
        wrong = self._library.specserve_decoder_step(
            self._decoder,
            byref(self.kv_struct(cache)),
            tokens.buffer_info()[0],
            positions.buffer_info()[0],
            byref(batch),
            chosen.buffer_info()[0],
            len(chosen),
            address,
            argmax.buffer_info()[0],
        )
        if wrong >= 0:
            raise IndexError(
                f"row {wrong} has token {tokens[wrong]} at position {positions[wrong]}; the model has "
                f"{self._vocab} tokens and {self._context} positions"
            )
        return logits, argmax.tolist()

    def _room(self, rows: int) -> tuple[torch.Tensor, int]:
        """For logits, with its address; the largest that is kept serves all smaller numbers of rows."""
        if rows * self._vocab > _KEPT_LOGITS:
            made = torch.empty(rows, self._vocab)
            return made, made.data_ptr()
        if (room := self._logits.get(rows)) is None:
            if rows > (largest := max(self._logits)):
                self._logits.clear()
                made = torch.empty(rows, self._vocab)
            else:
                made = self._logits[largest][0][:rows]
            room = self._logits[rows] = made, made.data_ptr()
        return room

    def kv_struct(self, cache: torch.Tensor) -> KvCacheStruct:
        """Raises ValueError: the cache has another model's shape, or a type that the kernels do not read."""
        if self._caches is not None and self._caches[0] is cache:
            return self._caches[1]
        check_tensor("cache", cache, (self._layers, 2, None, *self._head_shape))
        if cache.dtype not in KV_DTYPES:
            raise ValueError(f"cache is {cache.dtype}; it must be one of {KV_DTYPES}")
        struct = KvCacheStruct(pointer(cache), cache.shape[2], cache.dtype == torch.bfloat16)
        self._caches = cache, struct
        return struct
