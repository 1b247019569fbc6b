"""KV compaction on the CPU: gathers, then scatters, plane by plane."""

from __future__ import annotations

import torch

from kernels.kv_compaction.reference import check_moves
from kernels.native.shared_library import load
from kernels.native.structures import pointer


def kv_compaction(cache: torch.Tensor, moves: torch.Tensor) -> None:
    """See `kernels.blocks.KvCompaction`; any element type."""
    check_moves(cache, moves)
    layers, two, slots, kv_heads, head_dim = cache.shape
    load().specserve_kv_compaction(
        pointer(cache),
        layers * two,
        slots,
        kv_heads * head_dim * cache.element_size(),
        pointer(moves),
        moves.shape[1],
    )
