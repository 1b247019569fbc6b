"""A process's memory on large pages, as far as Linux gives them."""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LARGE_PAGE_BYTES = 2 * 2**20
_PAGE_BYTES = 4096
_PAGES = LARGE_PAGE_BYTES // _PAGE_BYTES
_MADV_COLLAPSE = 25  # Linux 6.1; the mmap module does not know it
_SELF = Path("/proc/self")


def use_large_pages() -> int:
    """Puts what this process has allocated so far on pages of 2 MiB, where it fills more than half of one; how many.

    In each step all weights of a model pass through the caches. What runs next finds its memory anew, and with pages of
    4 KiB that of the page tables too. Returns 0 where the system has no such pages or no way to ask for them.
    """
    if sys.platform != "linux" or os.sysconf("SC_PAGE_SIZE") != _PAGE_BYTES:  # others have other large pages
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with suppress(OSError):  # a sandbox may hide /proc
        return sum(madvise(page, LARGE_PAGE_BYTES, _MADV_COLLAPSE) == 0 for page in list(_filled_pages()))
    return 0


def _filled_pages() -> Iterator[int]:
    """The addresses at which a large page would have more than half of its memory in use."""
    with (_SELF / "pagemap").open("rb", buffering=0) as pagemap:
        for begin, end in _private_memory():
            first = -(-begin // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
            for page in range(first, end - LARGE_PAGE_BYTES + 1, LARGE_PAGE_BYTES):
                pagemap.seek(8 * (page // _PAGE_BYTES))
                if sum(entry >> 63 for entry in array("Q", pagemap.read(8 * _PAGES))) > _PAGES // 2:
                    yield page


def _private_memory() -> Iterator[tuple[int, int]]:
    """Where memory that can be written and belongs to no file begins and ends."""
    for line in (_SELF / "maps").read_text().splitlines():
        bounds, rights, _, _, inode = line.split()[:5]
        if rights == "rw-p" and inode == "0":
            begin, end = bounds.split("-")
            yield int(begin, 16), int(end, 16)
