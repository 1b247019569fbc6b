"""KV compaction of every implementation, also where sources and targets overlap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import KvCompaction
from kernels.kv_compaction import native, reference

IMPLEMENTATIONS = [reference.kv_compaction, native.kv_compaction]


def expected_cache(cache: torch.Tensor, sources: list[int], targets: list[int]) -> torch.Tensor:
    moved = cache.clone()
    for source, target in zip(sources, targets, strict=True):
        moved[:, :, target] = cache[:, :, source]
    return moved


@pytest.mark.parametrize("compact", IMPLEMENTATIONS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_moves_as_if_all_sources_were_read_first(compact: KvCompaction, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 12))
    targets = data.draw(st.lists(st.integers(0, slots - 1), unique=True))
    sources = data.draw(st.lists(st.integers(0, slots - 1), min_size=len(targets), max_size=len(targets)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cache = torch.randn(3, 2, slots, 2, 5).to(dtype)
    expected = expected_cache(cache, sources, targets)
    compact(cache, sources, targets)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("compact", IMPLEMENTATIONS)
def test_wrong_operands_are_named(compact: KvCompaction) -> None:
    cache = torch.zeros(1, 2, 4, 1, 8)
    with pytest.raises(ValueError, match="1 sources and 2 targets; each source needs a target"):
        compact(cache, [1], [0, 2])
    with pytest.raises(IndexError, match=r"slots 0\.\.4; the cache has 4"):
        compact(cache, [4], [0])
    with pytest.raises(ValueError, match="cache has shape"):
        compact(cache[0], [1], [0])
