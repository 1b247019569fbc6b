# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Growing trees by a level on the GPU, in Triton: four launches, whatever the sizes.

1. A program takes a tile of a row's vocabulary: its best tokens, and its share of the softmax's sum.
2. A program takes a row: the best of its tiles' tokens, and their confidences (these two in `children.py`).
3. Of the nodes that a tree has and may get, each finds its own rank: how many stand before it.
4. A program takes a tree: the next frontier and its rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from kernels.blocks import check_tensor
from kernels.tree_growth.children import (
    HIGHEST,
    MAX_TILE,
    MAX_VOCAB,
    MIN_TILE,
    UNALIGNED,
    best_children,
    compiler_options,
)
from kernels.tree_growth.levels import CachePlaces, FrontierRows, TreeRules, Trees

MAX_KEPT = 256  # nodes of a tree below its root
RANKED, COMPARED = 32, 128  # nodes that a program ranks, and that it compares them with at a time


@triton.jit
def _distances(kept_confidences, confidences, tree, kept, children, node):
    """int64: the more probable a node, the smaller; the kept nodes come first, the children behind them.

    Confidences are at most 0, so that their order is the reverse of their magnitudes', and that is the order of the
    bits; NaN comes last.
    """
    known = tl.load(kept_confidences + tree * kept + node, mask=node < kept, other=0.0)
    inside = (node >= kept) & (node < kept + children)
    new = tl.load(confidences + tree * children + node - kept, mask=inside, other=0.0)
    bits = tl.where(node < kept, known, new).to(tl.int64, bitcast=True)
    return tl.where(node < kept + children, bits & HIGHEST, HIGHEST)


@triton.jit(
    do_not_specialize=["kept", "width", "children"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _keep_kernel(
    kept_confidences,  # [trees, kept]
    kept_tokens,
    kept_parents,
    kept_slots,
    above_slots,  # [trees, width]
    token_ids,  # [trees, width, children]
    confidences,
    nodes,
    depth,
    out_confidences,  # [trees, kept]
    out_tokens,
    out_parents,
    out_slots,
    out_rows,
    kept,
    width,
    children,
    RANKED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    tree = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    count = width * children
    own = _distances(kept_confidences, confidences, tree, kept, count, node)
    before = tl.zeros([RANKED, COMPARED], tl.int32)
    for first in range(0, kept + count, COMPARED):
        other = first + tl.arange(0, COMPARED)
        theirs = _distances(kept_confidences, confidences, tree, kept, count, other)[None, :]
        tied = (theirs == own[:, None]) & (other[None, :] < node[:, None])
        before += ((theirs < own[:, None]) | tied).to(tl.int32)
    # Ranks are a permutation: each place is written once.
    rank = tl.sum(before, axis=1)
    stays = (node < kept + count) & (rank < kept)
    known, added = stays & (node < kept), stays & (node >= kept)
    child = node - kept
    row = child // children
    source, target = tree * kept + node, tree * kept + rank
    new = tree * count + child
    limit = tl.where(tl.load(depth + tree) > 0, tl.load(nodes + tree), 0)
    old_confidence = tl.load(kept_confidences + source, mask=known, other=0.0)
    new_confidence = tl.load(confidences + new, mask=added, other=0.0)
    confidence = tl.where(added, new_confidence, old_confidence)
    tl.store(out_confidences + target, tl.where(rank < limit, confidence, -float("inf")), mask=stays)
    old_token = tl.load(kept_tokens + source, mask=known, other=0)
    tl.store(out_tokens + target, tl.where(added, tl.load(token_ids + new, mask=added, other=0), old_token), mask=stays)
    old_parent = tl.load(kept_parents + source, mask=known, other=0)
    new_parent = tl.load(above_slots + tree * width + row, mask=added, other=0)
    tl.store(out_parents + target, tl.where(added, new_parent, old_parent), mask=stays)
    tl.store(out_slots + target, tl.load(kept_slots + source, mask=known, other=-1), mask=stays)
    tl.store(out_rows + target, tl.where(added, row, -1), mask=stays)


@triton.jit(
    do_not_specialize=["kept", "width", "beam", "blocks", "scratch_slot", "level"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _frontier_kernel(
    confidences,  # [trees, kept]
    token_ids,
    slots,
    rows,  # of the parents in the last frontier, -1 for a node of an earlier level
    above_masks,  # [trees, width, WORDS]
    floor,
    depth,
    lengths,
    block_tables,  # [trees, blocks]
    out_confidences,  # [trees, beam]
    out_slots,
    out_masks,  # [trees, beam, WORDS]
    out_tokens,
    out_positions,
    out_cache_slots,
    out_prefixes,
    kept,
    width,
    beam,
    blocks,
    scratch_slot,
    level,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    BEAM_PADDED: tl.constexpr,
):
    tree = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, KEPT_PADDED)
    place = tree * kept + node
    confidence = tl.load(confidences + place, mask=node < kept, other=-float("inf"))
    row = tl.load(rows + place, mask=node < kept, other=-1)
    wanted = (confidence > -float("inf")) & (confidence >= tl.load(floor + tree)) & (row >= 0)
    wanted = wanted & (level < tl.load(depth + tree))
    order = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    wanted = wanted & (order < beam)
    slot = (1 + (level - 1) * beam + order).to(tl.int64)
    tl.store(slots + place, slot, mask=wanted)
    target = tree * beam + order
    length = tl.load(lengths + tree)
    entry = length + slot
    block = tl.load(block_tables + tree * blocks + entry // BLOCK_SIZE, mask=wanted, other=0).to(tl.int64)
    zeros = tl.zeros([KEPT_PADDED], tl.int64)
    tl.store(out_confidences + target, confidence, mask=wanted)
    tl.store(out_slots + target, slot, mask=wanted)
    tl.store(out_tokens + target, tl.load(token_ids + place, mask=wanted, other=0), mask=wanted)
    tl.store(out_positions + target, length + level + zeros, mask=wanted)
    tl.store(out_cache_slots + target, block * BLOCK_SIZE + entry % BLOCK_SIZE, mask=wanted)
    tl.store(out_prefixes + target, (length + zeros).to(tl.int32), mask=wanted)
    for word in tl.static_range(WORDS):
        seen = tl.load(above_masks + (tree * width + row) * WORDS + word, mask=wanted, other=0)
        own = tl.where(slot // 64 == word, (zeros + 1) << (slot % 64), 0)
        tl.store(out_masks + target * WORDS + word, seen | own, mask=wanted)
    # what is left of the frontier has no node
    other = tl.arange(0, BEAM_PADDED)
    unused = (other >= tl.sum(wanted.to(tl.int32), axis=0)) & (other < beam)
    target = tree * beam + other
    nothing = tl.zeros([BEAM_PADDED], tl.int64)
    tl.store(out_confidences + target, tl.full([BEAM_PADDED], -float("inf"), tl.float64), mask=unused)
    tl.store(out_slots + target, nothing, mask=unused)
    tl.store(out_tokens + target, nothing, mask=unused)
    tl.store(out_positions + target, nothing, mask=unused)
    tl.store(out_cache_slots + target, nothing + scratch_slot, mask=unused)
    tl.store(out_prefixes + target, nothing.to(tl.int32), mask=unused)
    for word in tl.static_range(WORDS):
        tl.store(out_masks + target * WORDS + word, nothing, mask=unused)


def grow_level(
    logits: torch.Tensor, rules: TreeRules, places: CachePlaces, trees: Trees, largest_tile: int = MAX_TILE
) -> Trees:
    """See `kernels.tree_growth.levels.GrowLevel`. Takes at most MAX_VOCAB tokens and MAX_KEPT nodes of a tree.

    Tokens of a node whose energies differ by less than 2^-32 of them may count as equally probable when its best are
    chosen. largest_tile: most tokens that a program takes at a time, a power of two.
    """
    count, width = trees.frontier.slots.shape
    check_tensor("logits", logits, (count, width, None), torch.float32)
    check_tensor("rules.nodes", rules.nodes, (count,))
    check_tensor("places.lengths", places.lengths, (count,))
    vocab, kept = logits.shape[2], trees.confidences.shape[1]
    if vocab > MAX_VOCAB:
        raise ValueError(f"{vocab} tokens; at most {MAX_VOCAB} can be told apart")
    if kept > MAX_KEPT:
        raise ValueError(f"trees of {kept} nodes; they may have at most {MAX_KEPT}")
    if rules.noise_keys is not None and trees.level >= rules.noise_keys.shape[1]:
        raise ValueError(f"noise_keys of {rules.noise_keys.shape[1]} levels; level {trees.level} has none")
    token_ids, confidences = best_children(logits, rules, trees, largest_tile)
    ranked, rows = _keep(token_ids, confidences, rules, trees)
    return _advance(ranked, rows, rules, places)


def _keep(
    token_ids: torch.Tensor, confidences: torch.Tensor, rules: TreeRules, trees: Trees
) -> tuple[Trees, torch.Tensor]:
    """The trees with their best nodes, not yet with a frontier; int64 [S, kept], the row of each new node's parent."""
    count, width, children = token_ids.shape
    kept = trees.confidences.shape[1]
    ranked = torch.empty_like(trees.confidences)
    tokens, parents, slots, rows = (torch.empty_like(trees.slots) for _ in range(4))
    _keep_kernel[(count, triton.cdiv(kept + width * children, RANKED))](
        trees.confidences,
        trees.token_ids,
        trees.parents,
        trees.slots,
        trees.frontier.slots,
        token_ids,
        confidences,
        rules.nodes,
        rules.depth,
        ranked,
        tokens,
        parents,
        slots,
        rows,
        kept,
        width,
        children,
        RANKED=RANKED,
        COMPARED=COMPARED,
        **compiler_options(RANKED * COMPARED),
    )
    return Trees(ranked, tokens, parents, slots, trees.frontier, trees.level), rows


def _advance(trees: Trees, rows: torch.Tensor, rules: TreeRules, places: CachePlaces) -> Trees:
    """The trees with the frontier of the next level, whose slots are written into theirs."""
    count, width, words = trees.frontier.masks.shape
    kept, beam = trees.confidences.shape[1], rules.beam
    token_ids, positions, cache_slots = (trees.slots.new_empty(count * beam) for _ in range(3))
    frontier = FrontierRows(
        trees.confidences.new_empty(count, beam),
        trees.slots.new_empty(count, beam),
        trees.slots.new_empty(count, beam, words),
        token_ids,
        positions,
        cache_slots,
        trees.slots.new_empty(count * beam, dtype=torch.int32),
    )
    _frontier_kernel[(count,)](
        trees.confidences,
        trees.token_ids,
        trees.slots,
        rows,
        trees.frontier.masks,
        rules.floor,
        rules.depth,
        places.lengths,
        places.block_tables,
        frontier.confidences,
        frontier.slots,
        frontier.masks,
        frontier.token_ids,
        frontier.positions,
        frontier.cache_slots,
        frontier.prefix_lengths,
        kept,
        width,
        beam,
        places.block_tables.shape[1],
        places.scratch_slot,
        trees.level + 1,
        BLOCK_SIZE=places.block_size,
        WORDS=words,
        KEPT_PADDED=triton.next_power_of_2(kept),
        BEAM_PADDED=triton.next_power_of_2(beam),
        **compiler_options(MIN_TILE),
    )
    return replace(trees, frontier=frontier, level=trees.level + 1)
