"""KV compaction in plain PyTorch, on any device: gather everything, then scatter."""

from __future__ import annotations

import torch

from kernels.blocks import check_tensor


def check_moves(cache: torch.Tensor, moves: torch.Tensor) -> None:
    """Raise ValueError unless the arguments have the shapes and types of `kernels.blocks.KvCompaction`."""
    check_tensor("cache", cache, (None, 2, None, None, None))
    check_tensor("moves", moves, (2, None), torch.int64)


def kv_compaction(cache: torch.Tensor, moves: torch.Tensor) -> None:
    """See `kernels.blocks.KvCompaction`."""
    check_moves(cache, moves)
    sources, targets = moves
    cache.index_copy_(2, targets, cache.index_select(2, sources))
