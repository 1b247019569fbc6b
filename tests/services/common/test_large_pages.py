from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from services.common.large_pages import LARGE_PAGE_BYTES, use_large_pages
from tests.process_memory import kib

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Memory:
    """Room for eight large pages, wherever it begins, of which nothing is in use."""

    def __init__(self) -> None:
        self.bytes = mmap.mmap(-1, 9 * LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def kib(self, field: str) -> int:
        return kib(ctypes.addressof(ctypes.c_char.from_buffer(self.bytes)), field)


@pytest.mark.skipif(not THP.exists(), reason="this kernel has no transparent huge pages")
def test_filled_memory_is_moved_to_large_pages_and_keeps_its_contents() -> None:
    memory = Memory()
    contents = bytes(range(256)) * (len(memory.bytes) // 256)
    memory.bytes[:] = contents
    if use_large_pages() == 0:
        pytest.skip("this kernel cannot collapse memory into large pages (Linux 6.1 can), or has none left")
    assert memory.kib("AnonHugePages") >= LARGE_PAGE_BYTES // 1024
    assert memory.bytes[:] == contents


def test_memory_that_is_hardly_used_takes_no_more_of_it() -> None:
    memory = Memory()
    for start in range(0, len(memory.bytes), LARGE_PAGE_BYTES):
        memory.bytes[start] = 1
    before = memory.kib("Rss")
    use_large_pages()
    assert memory.kib("Rss") - before < LARGE_PAGE_BYTES // 1024
