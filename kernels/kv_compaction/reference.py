"""KV compaction in plain PyTorch, on any device: gather everything, then scatter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.blocks import check_tensor


def check_moves(cache: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Raise ValueError or IndexError unless the arguments are those of `kernels.blocks.KvCompaction`."""
    check_tensor("cache", cache, (None, 2, None, None, None))
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets; each source needs a target")
    if sources and not 0 <= min(*sources, *targets) <= max(*sources, *targets) < cache.shape[2]:
        raise IndexError(f"slots {min(*sources, *targets)}..{max(*sources, *targets)}; the cache has {cache.shape[2]}")


def kv_compaction(cache: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """See `kernels.blocks.KvCompaction`."""
    check_moves(cache, sources, targets)
    left, taken = torch.tensor([sources, targets], dtype=torch.int64, device=cache.device)
    cache.index_copy_(2, taken, cache.index_select(2, left))
