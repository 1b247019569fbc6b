"""Memory for packed weights: one behind the other, aligned, alive as long as it is used."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from kernels.backend import choose_backend
from kernels.native.memory import CACHE_LINE_BYTES, CHUNK_BYTES, HUGE_PAGE_BYTES, PackedMemory
from kernels.packed_linear.native import NativeLinear


def test_tensors_follow_each_other_on_cache_lines() -> None:
    memory = PackedMemory()
    first, second, third = memory.take(5), memory.take(16), memory.take(1)
    assert first.data_ptr() % HUGE_PAGE_BYTES == 0
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
    taken = PackedMemory().take(HUGE_PAGE_BYTES // 4)
    region = _region_of(taken.data_ptr())
    assert "hg" in region["VmFlags"].split(), "the mapping is not advised to use large pages"


def _region_of(address: int) -> dict[str, str]:
    """The fields of the mapping in /proc/self/smaps that holds an address."""
    fields: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name.endswith(":"):
            fields[name[:-1]] = value
            continue
        if fields.get("holds"):
            return fields
        start, stop = (int(bound, 16) for bound in name.split("-"))
        fields = {"holds": "yes"} if start <= address < stop else {}
    return fields


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
