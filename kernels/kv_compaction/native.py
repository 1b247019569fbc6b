"""KV compaction on the CPU: gathers, then scatters, plane by plane."""

from __future__ import annotations

import torch

from kernels.kv_compaction.reference import check_moves
from kernels.native.shared_library import load, load_for_short_calls
from kernels.native.structures import pointer

# What is moved in some tens of microseconds.
_SHORT_BYTES = 2**18


def kv_compaction(cache: torch.Tensor, moves: torch.Tensor) -> None:
    """See `kernels.blocks.KvCompaction`; any element type."""
    check_moves(cache, moves)
    layers, two, slots, kv_heads, head_dim = cache.shape
    planes, slot_bytes, count = layers * two, kv_heads * head_dim * cache.element_size(), moves.shape[1]
    library = load_for_short_calls() if planes * slot_bytes * count <= _SHORT_BYTES else load()
    library.specserve_kv_compaction(pointer(cache), planes, slots, slot_bytes, pointer(moves), count)
