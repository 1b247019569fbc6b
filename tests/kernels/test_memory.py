"""Memory for packed weights: one behind the other, aligned, alive as long as it is used."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from kernels.backend import choose_backend
from kernels.native.memory import CACHE_LINE_BYTES, CHUNK_BYTES, LARGE_PAGE_BYTES, PackedMemory, zeros
from kernels.packed_linear.native import NativeLinear
from tests.process_memory import kib, mapping_of


def test_tensors_follow_each_other_on_cache_lines() -> None:
    memory = PackedMemory()
    first, second, third = memory.take(5), memory.take(16), memory.take(1)
    assert first.data_ptr() % LARGE_PAGE_BYTES == 0
    assert second.data_ptr() == first.data_ptr() + CACHE_LINE_BYTES
    assert third.data_ptr() == second.data_ptr() + CACHE_LINE_BYTES
    assert [len(taken) for taken in (first, second, third)] == [5, 16, 1]
    assert first.dtype is torch.int32
    assert not first.any()


def test_what_exceeds_a_chunk_gets_its_own() -> None:
    memory = PackedMemory()
    small, large = memory.take(1), memory.take(CHUNK_BYTES // 4 + 1)
    large.fill_(7)
    assert len(large) == CHUNK_BYTES // 4 + 1
    assert small[0] == 0


def test_a_tensor_outlives_its_memory() -> None:
    taken = PackedMemory().take(1000).fill_(3)
    gc.collect()
    assert taken.tolist() == [3] * 1000


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no large pages")
def test_large_pages_are_asked_for() -> None:
    taken = PackedMemory().take(LARGE_PAGE_BYTES // 4)
    assert "hg" in mapping_of(taken.data_ptr())["VmFlags"].split(), "the mapping is not advised to use large pages"


def test_layers_of_a_backend_are_packed_one_behind_the_other() -> None:
    backend = choose_backend(torch.device("cpu"), "native")
    torch.manual_seed(0)
    weights = [torch.randn(64, 48), torch.randn(48, 64)]
    layers = [backend.pack_head(weight) for weight in weights]
    assert all(isinstance(layer, NativeLinear) for layer in layers)
    first, second = (layer.struct.packed for layer in layers if isinstance(layer, NativeLinear))
    assert second == first + 64 * 48 * 4
    x = torch.randn(3, 48)
    assert torch.equal(layers[0](x), NativeLinear(weights[0])(x))


def test_zeros_start_with_a_large_page_and_take_memory_only_where_they_are_written_to() -> None:
    cache = zeros((2, 3, 2**22), torch.bfloat16)
    assert cache.shape == (2, 3, 2**22)
    assert cache.dtype == torch.bfloat16
    assert cache.data_ptr() % LARGE_PAGE_BYTES == 0
    before = kib(cache.data_ptr(), "Rss")
    cache[1, 2] = 1
    written = 2 * 2**22 // 1024
    assert written <= kib(cache.data_ptr(), "Rss") - before <= written + 2 * LARGE_PAGE_BYTES // 1024
    assert cache[0].count_nonzero() == 0
    assert cache[1].count_nonzero() == 2**22
