# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""KV compaction on the GPU, in Triton: one launch for all layers, keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.kv_compaction.reference import check_moves

MAX_MOVES = 32
CHUNK = 128


# One program for all numbers of moves: what is compiled for a new one keeps requests waiting.
@triton.jit(do_not_specialize=["moves"], do_not_specialize_on_alignment=["sources", "targets"])
def _kv_compaction_kernel(
    cache,  # [planes, slots, slot_size]
    sources,
    targets,
    moves,
    slots,
    slot_size,
    MOVES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    plane = cache + tl.program_id(0).to(tl.int64) * slots * slot_size
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    for first in range(0, moves, MOVES):
        move = first + tl.arange(0, MOVES)
        source = tl.load(sources + move, mask=move < moves, other=0)
        target = tl.load(targets + move, mask=move < moves, other=0)
        used = (move < moves)[:, None] & (column < slot_size)[None, :]
        moved = tl.load(plane + source[:, None] * slot_size + column[None, :], mask=used)
        # A warp must not write what another has yet to read, in this round and in the next.
        tl.debug_barrier()
        tl.store(plane + target[:, None] * slot_size + column[None, :], moved, mask=used)
        tl.debug_barrier()


def kv_compaction(cache: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """See `kernels.blocks.KvCompaction`, under one condition: no slot is first a target and later a source.

    Moving an accepted path meets it: with a sequence's moves in order, entries only move towards the front, and the
    slots of two sequences are distinct. Up to MAX_MOVES moves need no condition.
    """
    check_moves(cache, sources, targets)
    layers, two, slots, kv_heads, head_dim = cache.shape
    count, slot_size = len(sources), kv_heads * head_dim
    if count == 0:
        return
    moves = torch.tensor([sources, targets], dtype=torch.int64).to(cache.device)
    _kv_compaction_kernel[(layers * two, triton.cdiv(slot_size, CHUNK))](
        cache,
        moves[0],
        moves[1],
        count,
        slots,
        slot_size,
        MOVES=MAX_MOVES,
        CHUNK=CHUNK,
        enable_fp_fusion=True,  # moves alone, but a compiler left to its default warns
    )
