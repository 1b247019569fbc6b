"""The paged KV cache: one tensor of slots, handed out to sequences in blocks (Kwon et al., 2023).

Knows nothing of trees or requests: a sequence is a list of blocks that holds logical entries 0, 1, 2, ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels.native.memory import zeros
from runtime.config import ModelConfig

BLOCK_SIZE = 16
CGROUP = Path("/sys/fs/cgroup")
SCRATCH_ENTRIES = 256  # behind the committed entries of one sequence, for the nodes of its tree


class CacheFull(RuntimeError):
    """Not enough free blocks; the caller waits, shrinks its draft or preempts a sequence."""


@dataclass(eq=False)
class CachedSequence:
    """The blocks of one sequence. Entries below `length` are committed; what lies behind them is scratch."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class KVCache:
    """Keys and values of all sequences: `data` is [layers, 2, (blocks + 1) * BLOCK_SIZE, kv_heads, head_dim].

    The last block is nobody's: rows that only pad a step write to its first slot, `scratch_slot`.

    Entry e of a sequence is in slot `blocks[e // BLOCK_SIZE] * BLOCK_SIZE + e % BLOCK_SIZE`.
    """

    def __init__(self, config: ModelConfig, blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.layers, 2, (blocks + 1) * BLOCK_SIZE, config.kv_heads, config.head_dim)
        # attention goes from block to block of all sequences, each block of each layer in a place of its own
        self.data = zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, device=device, dtype=dtype)
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def scratch_slot(self) -> int:
        return self.blocks * BLOCK_SIZE

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_needed(self, sequence: CachedSequence, entries: int) -> int:
        """Blocks that `reserve` would take to hold `entries` entries."""
        return max(0, -(-entries // BLOCK_SIZE) - len(sequence.blocks))

    def reserve(self, sequence: CachedSequence, entries: int) -> None:
        """Give the sequence blocks for its first `entries` entries.

        Raises:
            CacheFull: not enough free blocks; nothing is taken then.
        """
        needed = self.blocks_needed(sequence, entries)
        if needed > len(self._free):
            raise CacheFull(f"{needed} blocks of {BLOCK_SIZE} entries wanted, {len(self._free)} free")
        for _ in range(needed):
            sequence.blocks.append(self._free.pop())

    def trim(self, sequence: CachedSequence) -> None:
        """Take back the blocks behind the committed entries."""
        keep = -(-sequence.length // BLOCK_SIZE)
        self._free.extend(reversed(sequence.blocks[keep:]))
        del sequence.blocks[keep:]

    def release(self, sequence: CachedSequence) -> None:
        """Take back everything that the sequence holds."""
        sequence.length = 0
        self.trim(sequence)

    def check_idle(self) -> None:
        """Raise AssertionError unless every block is free exactly once: to be called when no sequence is alive."""
        assert sorted(self._free) == list(range(self.blocks)), "KV blocks leaked or were freed twice"


def slot(sequence: CachedSequence, entry: int) -> int:
    """The slot of a logical entry."""
    return sequence.blocks[entry // BLOCK_SIZE] * BLOCK_SIZE + entry % BLOCK_SIZE


def blocks_for_cache(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, fraction: float, max_sequences: int, blocks: int = 0
) -> int:
    """`blocks`, or, when that is 0, what fits into `fraction` of the free memory and `max_sequences` can use.

    Raises:
        CacheFull: too small for one sequence of full context and its largest tree.
    """
    if not blocks:
        return blocks_from_memory(config, device, dtype, fraction, max_sequences)
    if blocks < (smallest := longest_sequence_blocks(config)):
        raise CacheFull(f"{blocks} KV blocks are too few for one sequence of full context; give at least {smallest}")
    return blocks


def blocks_from_memory(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, fraction: float, max_sequences: int
) -> int:
    """How many blocks fit into `fraction` of the memory that is free now.

    At least one sequence of full context and its largest tree; never more than `max_sequences` of them need.

    Raises:
        CacheFull: less memory is free than one sequence of full context needs.
    """
    block_bytes = config.kv_entry_numel * BLOCK_SIZE * dtype.itemsize
    longest = longest_sequence_blocks(config)
    affordable = int(free_memory(device) * fraction) // block_bytes
    if affordable < longest:
        raise CacheFull(
            f"a sequence of {config.context_length} tokens needs {longest * block_bytes / 2**20:.0f} MiB of KV cache, "
            f"but {fraction:.0%} of the free memory is {affordable * block_bytes / 2**20:.0f} MiB; "
            "free memory, raise the fraction or shorten the context"
        )
    return min(affordable, max_sequences * longest)


def longest_sequence_blocks(config: ModelConfig) -> int:
    """Blocks of a sequence of full context and its largest tree."""
    return -(-(config.context_length + SCRATCH_ENTRIES) // BLOCK_SIZE)


def free_memory(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes that can still be allocated: the device's free memory, or the host's, within a container's limit.

    cgroup: the folder of the container's control group (version 2).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = cgroup / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - _held(cgroup))
    return free


def _held(cgroup: Path) -> int:
    """Bytes that a control group cannot give back: not the pages of files, which are read again when wanted."""
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    used = int((cgroup / "memory.current").read_text())
    return used - int(stat["active_file"]) - int(stat["inactive_file"])
