"""KV compaction on the CPU: gathers, then scatters, plane by plane."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from kernels.kv_compaction.reference import check_moves
from kernels.native.shared_library import load, load_for_short_calls
from kernels.native.structures import pointer

# What is moved in some tens of microseconds.
_SHORT_BYTES = 2**18


def kv_compaction(cache: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """See `kernels.blocks.KvCompaction`; any element type."""
    check_moves(cache, sources, targets)
    layers, two, slots, kv_heads, head_dim = cache.shape
    planes, slot_bytes, count = layers * two, kv_heads * head_dim * cache.element_size(), len(sources)
    library = load_for_short_calls() if planes * slot_bytes * count <= _SHORT_BYTES else load()
    left, taken = array("q", sources), array("q", targets)
    addresses = left.buffer_info()[0], taken.buffer_info()[0]
    library.specserve_kv_compaction(pointer(cache), planes, slots, slot_bytes, *addresses, count)
