from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.large_pages import LARGE_PAGE_BYTES, use_large_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    mapping = mmap.mmap(-1, 8 * LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield mapping
    mapping.close()


def _kib(mapping: mmap.mmap, field: str) -> int:
    """A field of the mapping that the memory lies in; Linux may have joined it with its neighbours."""
    anchor = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(anchor)
    del anchor
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            begin, end = (int(bound, 16) for bound in name.split("-"))
            inside = begin <= address < end
        elif inside and name == f"{field}:":
            return int(line.split()[1])
    raise LookupError(field)


@pytest.mark.skipif(not THP.exists(), reason="this kernel has no transparent huge pages")
def test_filled_memory_is_moved_to_large_pages_and_keeps_its_contents(memory: mmap.mmap) -> None:
    contents = bytes(range(256)) * (len(memory) // 256)
    memory[:] = contents
    before = _kib(memory, "AnonHugePages")
    moved = use_large_pages()
    if moved == 0:
        pytest.skip("this kernel cannot collapse memory into large pages (Linux 6.1 can), or has none left")
    assert _kib(memory, "AnonHugePages") - before >= 7 * LARGE_PAGE_BYTES // 1024
    assert memory[:] == contents


def test_memory_that_is_hardly_used_takes_no_more_of_it(memory: mmap.mmap) -> None:
    for start in range(0, len(memory), LARGE_PAGE_BYTES):
        memory[start] = 1
    before = _kib(memory, "Rss")
    use_large_pages()
    assert _kib(memory, "Rss") - before < LARGE_PAGE_BYTES // 1024
