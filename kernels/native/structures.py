"""The C structures of the native library, field for field, and how tensors become pointers in them.

A structure holds bare pointers: whoever makes one keeps the tensors alive beside it.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache

import torch

from kernels.blocks import AttentionBatch

# Storage of packed_linear.h
STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class LinearStruct(Structure):
    """LinearWeights of packed_linear.h."""

    _fields_ = (
        ("packed", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("storage", c_int32),
    )


class AttentionBatchStruct(Structure):
    """AttentionBatch of tree_attention.h."""

    _fields_ = (
        ("block_tables", c_void_p),
        ("max_blocks", c_int64),
        ("block_size", c_int64),
        ("row_sequences", c_void_p),
        ("prefix_lengths", c_void_p),
        ("masks", c_void_p),
        ("words", c_int64),
        ("slots", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rows", c_int64),
    )


class AttentionLayerStruct(Structure):
    """AttentionLayer of decoder_blocks.h."""

    _fields_ = (
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("norm_eps", c_float),
        ("scale", c_float),
    )


class MlpLayerStruct(Structure):
    """MlpLayer of decoder_blocks.h."""

    _fields_ = (
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("norm", c_void_p),
        ("norm_eps", c_float),
    )


class DecoderStruct(Structure):
    """Decoder of decoder.h."""

    _fields_ = (
        ("attention", POINTER(AttentionLayerStruct)),
        ("mlp", POINTER(MlpLayerStruct)),
        ("layers", c_int64),
        ("head", LinearStruct),
        ("final_norm", c_void_p),
        ("norm_eps", c_float),
        ("embedding_storage", c_int32),
        ("embedding", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("vocab", c_int64),
        ("context", c_int64),
    )


class KvCacheStruct(Structure):
    """KvCache of decoder.h."""

    _fields_ = (
        ("data", c_void_p),
        ("slots", c_int64),
        ("is_bfloat16", c_int32),
    )


class TreeBoundsStruct(Structure):
    """TreeBounds of tree_growth.h."""

    _fields_ = (
        ("max_nodes", c_int64),
        ("max_depth", c_int64),
        ("beam", c_int64),
        ("floor", c_float),
        ("widths", c_void_p),
    )


class ChildRuleStruct(Structure):
    """ChildRule of child_choice.h."""

    _fields_ = (
        ("temperature", c_float),
        ("scale", c_float),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_float),
        ("noisy", c_int32),
        ("seed", c_uint64),
    )


class DraftSequenceStruct(Structure):
    """DraftSequence of draft_loop.h."""

    _fields_ = (
        ("block_table", c_void_p),
        ("blocks", c_int64),
        ("length", c_int64),
        ("pending", c_void_p),
        ("pending_count", c_int64),
        ("bounds", TreeBoundsStruct),
        ("rule", ChildRuleStruct),
    )


class GrownTreeStruct(Structure):
    """GrownTree of tree_growth.h."""

    _fields_ = (
        ("token_ids", c_void_p),
        ("parents", c_void_p),
        ("confidences", c_void_p),
        ("slot_tokens", c_void_p),
        ("slot_parents", c_void_p),
        ("nodes", c_int64),
        ("slots", c_int64),
    )


class ScaleTablesStruct(Structure):
    """ScaleTables of tree_merging.h."""

    _fields_ = (
        ("starts", c_void_p),
        ("scales", c_void_p),
    )


class DraftsStruct(Structure):
    """Drafts of tree_merging.h."""

    _fields_ = (
        ("trees", c_void_p),
        ("sizes", c_void_p),
        ("tables", c_void_p),
        ("union_tables", c_void_p),
        ("most_nodes", c_void_p),
        ("token_ids", c_void_p),
        ("parents", c_void_p),
        ("confidences", c_void_p),
    )


class UnionsStruct(Structure):
    """Unions of tree_merging.h."""

    _fields_ = (
        ("sizes", c_void_p),
        ("deepest", c_void_p),
        ("token_ids", c_void_p),
        ("parents", c_void_p),
        ("confidences", c_void_p),
        ("corrected", c_void_p),
        ("maps", c_void_p),
    )


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's data; None, C's null, for None.

    Raises:
        ValueError: the tensor is not on the CPU.
    """
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise ValueError(f"a tensor is on {tensor.device}; the native kernels take tensors on the CPU")
    return tensor.data_ptr()


@lru_cache(maxsize=4)
def batch_struct(batch: AttentionBatch) -> AttentionBatchStruct:
    """One structure for all layers of a step. The cache keeps the last batches, and so their tensors, alive."""
    return AttentionBatchStruct(
        block_tables=pointer(batch.block_tables),
        max_blocks=batch.block_tables.shape[1],
        block_size=batch.block_size,
        row_sequences=pointer(batch.row_sequences),
        prefix_lengths=pointer(batch.prefix_lengths),
        masks=pointer(batch.masks),
        words=batch.masks.shape[1],
        slots=pointer(batch.slots),
        cos=pointer(batch.cos),
        sin=pointer(batch.sin),
        rows=batch.rows,
    )
