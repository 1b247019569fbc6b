"""Blocks are handed out once, come back once, and are sized from memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import ModelConfig, read_config
from runtime.kv_cache import (
    BLOCK_SIZE,
    CachedSequence,
    CacheFull,
    KVCache,
    blocks_from_memory,
    free_memory,
    longest_sequence_blocks,
    slot,
)
from tests.tiny_models import write_model

CPU = torch.device("cpu")
SIZE = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(write_model(tmp_path_factory.mktemp("model")))


Step = tuple[str, int, int]
steps = st.lists(st.tuples(st.sampled_from(["reserve", "commit", "release"]), st.integers(0, 3), st.integers(0, 80)))


@given(steps)
def test_no_block_is_shared_or_lost(config: ModelConfig, steps: list[Step]) -> None:
    cache = KVCache(config, SIZE, CPU, torch.float32)
    sequences = [CachedSequence() for _ in range(4)]
    for action, index, amount in steps:
        sequence = sequences[index]
        if action == "reserve":
            before = list(sequence.blocks)
            try:
                cache.reserve(sequence, amount)
                assert len(sequence.blocks) * BLOCK_SIZE >= amount
            except CacheFull:
                assert sequence.blocks == before, "a refused reservation takes nothing"
        elif action == "commit":
            sequence.length = min(amount, len(sequence.blocks) * BLOCK_SIZE)
            cache.trim(sequence)
            assert len(sequence.blocks) == -(-sequence.length // BLOCK_SIZE)
        else:
            cache.release(sequence)
        held = [block for other in sequences for block in other.blocks]
        assert len(set(held)) == len(held)
        assert len(held) + cache.free_blocks == SIZE
    slots = [slot(other, entry) for other in sequences for entry in range(len(other.blocks) * BLOCK_SIZE)]
    assert len(set(slots)) == len(slots)
    for sequence in sequences:
        cache.release(sequence)
    cache.check_idle()


def test_an_idle_cache_that_lost_a_block_is_noticed(config: ModelConfig) -> None:
    cache = KVCache(config, SIZE, CPU, torch.float32)
    cache.reserve(CachedSequence(), 1)
    with pytest.raises(AssertionError, match="leaked"):
        cache.check_idle()


def test_pages_of_files_are_free_within_a_limit(tmp_path: Path) -> None:
    mib = 2**20
    (tmp_path / "memory.max").write_text(f"{100 * mib}\n")
    (tmp_path / "memory.current").write_text(f"{90 * mib}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {20 * mib}\nfile {60 * mib}\nshmem {5 * mib}\ninactive_file {40 * mib}\nactive_file {15 * mib}\n"
    )
    assert free_memory(CPU, tmp_path) == (100 - 90 + 40 + 15) * mib
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU, tmp_path) > 100 * mib


def test_the_size_follows_the_memory(config: ModelConfig) -> None:
    longest = longest_sequence_blocks(config)
    assert blocks_from_memory(config, CPU, torch.float32, 0.9, max_sequences=3) == 3 * longest
    block_bytes = config.kv_entry_numel * BLOCK_SIZE * 4
    fraction = 1.5 * longest * block_bytes / free_memory(CPU)
    assert longest <= blocks_from_memory(config, CPU, torch.float32, fraction, max_sequences=1000) < 2 * longest
    huge = dataclasses.replace(config, context_length=10**12)
    with pytest.raises(CacheFull, match="MiB of KV cache, but 90% of the free memory is"):
        blocks_from_memory(huge, CPU, torch.float32, 0.9, max_sequences=1)
