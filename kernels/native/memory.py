"""Memory for packed weights and KV caches, on pages of 2 MiB where Linux has them. Nothing here knows what lies in it.

With such pages the processor hardly ever has to look up where an address is.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch

CHUNK_BYTES = 32 * 2**20
LARGE_PAGE_BYTES = 2 * 2**20
CACHE_LINE_BYTES = 64


class PackedMemory:
    """Hands out tensors one behind the other, in the order of the calls.

    What is packed in the order of its use is read as one stream: a model far larger than the caches is read faster for
    it. A chunk is given back with the last tensor in it; of what was not handed out, only the begun page takes memory.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.int32)

    def take(self, words: int) -> torch.Tensor:
        """int32 [words], zeros, from the start of a cache line."""
        size = -(-words * 4 // CACHE_LINE_BYTES) * CACHE_LINE_BYTES // 4
        if size > len(self._rest):
            self._rest = _map(max(4 * size, CHUNK_BYTES))
        taken, self._rest = self._rest[:words], self._rest[size:]
        return taken


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """From the start of a large page; takes memory as it is written to."""
    words = _map(-(-math.prod(shape) * dtype.itemsize // 4) * 4)
    return words.view(dtype)[: math.prod(shape)].view(*shape)


def _map(size: int) -> torch.Tensor:
    """Zeros, int32 [size / 4], from the start of a large page."""
    mapping = mmap.mmap(-1, size + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without large pages: the memory serves as well, only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
    words = torch.frombuffer(mapping, dtype=torch.int32)  # keeps the mapping alive
    start = -words.data_ptr() % LARGE_PAGE_BYTES // 4
    return words[start : start + size // 4]
