"""Growing trees in Triton against PyTorch, on CUDA or in Triton's interpreter: test_triton.py runs both.

Triton decides at its import which of the two it is, so that these cases need a process of their own.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kernels.tree_growth import children as child_kernels
from kernels.tree_growth import triton as tree_kernels
from kernels.tree_growth.children import MAX_VOCAB, tile_of
from kernels.tree_growth.levels import CachePlaces, TreeRules, Trees
from kernels.tree_growth.triton import MAX_KEPT, grow_level
from speculation.batch_growth import BatchGrowth, GrowthRules
from speculation.noise import gumbel_keys, gumbel_noise_of

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
BLOCK_SIZE, SCRATCH_SLOT = 16, 99_999


@dataclass(frozen=True)
class Sizes:
    """kept: nodes of the largest tree. largest_tile: of tokens; small ones make many of a small vocabulary."""

    beam: int
    kept: int
    vocab: int
    levels: int
    noisy: bool
    words: int = 1
    trees: int = 4
    largest_tile: int = 32


SMALL = [
    Sizes(beam=1, kept=4, vocab=97, levels=4, noisy=False),
    Sizes(beam=1, kept=1, vocab=30, levels=3, noisy=True),
    Sizes(beam=1, kept=16, vocab=61, levels=4, noisy=True, trees=1),
    Sizes(beam=2, kept=16, vocab=130, levels=3, noisy=True, trees=3),
    Sizes(beam=4, kept=16, vocab=97, levels=3, noisy=False, trees=3),
    Sizes(beam=4, kept=16, vocab=45, levels=4, noisy=True, trees=5),
    Sizes(beam=8, kept=16, vocab=61, levels=3, noisy=True, words=4, trees=2),
    Sizes(beam=16, kept=16, vocab=20, levels=6, noisy=False, words=4, trees=1),
    Sizes(beam=5, kept=64, vocab=70, levels=3, noisy=True, trees=2),
    Sizes(beam=3, kept=7, vocab=5, levels=4, noisy=True),
    Sizes(beam=1, kept=255, vocab=260, levels=2, noisy=False, trees=1),
]
REAL = [
    Sizes(beam=4, kept=16, vocab=4096, levels=8, noisy=True, largest_tile=child_kernels.MAX_TILE),
    Sizes(beam=8, kept=64, vocab=32_000, levels=4, noisy=False, largest_tile=child_kernels.MAX_TILE),
    Sizes(beam=8, kept=64, vocab=128_256, levels=4, noisy=True, largest_tile=child_kernels.MAX_TILE),
    Sizes(beam=64, kept=255, vocab=151_936, levels=3, noisy=True, words=4, largest_tile=child_kernels.MAX_TILE),
]


def random_rules(sizes: Sizes, chance: random.Random) -> TreeRules:
    """Of trees that want everything, little or nothing; the first one everything."""

    def any_of(first: float, *others: float) -> list[float]:
        return [first, *(chance.choice([first, *others]) for _ in range(sizes.trees - 1))]

    nodes, depth, noisy = torch.tensor(
        [
            any_of(sizes.kept, sizes.kept // 2, 1, 0),
            any_of(sizes.levels, sizes.levels - 1, 1, 0),
            any_of(1, 0),
        ]
    ).long()
    floor, temperature, scale = torch.tensor(
        [any_of(-math.inf, math.log(0.02), math.log(0.2)), any_of(0.75, 2.0**-66, 1.25), any_of(0.4, 0.01, 2.0)],
        dtype=torch.float64,
    )
    seeds = [chance.randrange(2**64) for _ in range(sizes.trees)]
    keys = torch.tensor([gumbel_keys(seed, range(7, 7 + sizes.levels)) for seed in seeds])
    rules = TreeRules(nodes, depth, floor, temperature, scale, keys, noisy, min(sizes.beam, sizes.kept))
    return rules if sizes.noisy else replace(rules, noise_keys=None, noisy=None)


def in_torch(rules: TreeRules, sizes: Sizes) -> BatchGrowth:
    noisy = None if rules.noisy is None else rules.noisy > 0
    own = GrowthRules(
        rules.nodes, rules.depth, rules.floor, rules.temperature.float(), rules.scale, rules.noise_keys, noisy
    )
    return BatchGrowth(own, sizes.kept, sizes.beam, sizes.words)


def random_places(sizes: Sizes, generator: torch.Generator) -> CachePlaces:
    lengths = torch.randint(0, 70, (sizes.trees,), generator=generator)
    blocks = -(-(70 + sizes.beam * sizes.levels) // BLOCK_SIZE)
    tables = torch.randint(0, 3000, (sizes.trees, blocks), generator=generator, dtype=torch.int32)
    return CachePlaces(lengths, tables, BLOCK_SIZE, SCRATCH_SLOT)


def on_device(rules: TreeRules, places: CachePlaces) -> tuple[TreeRules, CachePlaces]:
    def moved(part: object) -> dict[str, object]:
        return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in vars(part).items()}

    return TreeRules(**moved(rules)), CachePlaces(**moved(places))  # type: ignore[arg-type]  # a mapping has lost which


def assert_same_trees(actual: Trees, expected: BatchGrowth) -> None:
    there = expected.confidences > -torch.inf
    assert torch.equal(actual.confidences.cpu() > -torch.inf, there)
    torch.testing.assert_close(actual.confidences.cpu(), expected.confidences, atol=1e-4, rtol=1e-5)
    for name in ("token_ids", "parents", "slots"):
        assert torch.equal(getattr(actual, name).cpu()[there], getattr(expected, name)[there]), name


def assert_same_frontier(actual: Trees, expected: BatchGrowth, places: CachePlaces) -> None:
    rows, wanted = actual.frontier, expected.frontier
    active, slots, shape = wanted.active, wanted.slots, wanted.slots.shape
    assert torch.equal(rows.confidences.cpu() > -torch.inf, active)
    assert torch.equal(rows.slots.cpu()[active], slots[active])
    assert torch.equal(rows.masks.cpu()[active], wanted.masks[active])
    assert torch.equal(rows.token_ids.cpu().view(shape)[active], wanted.token_ids[active])
    assert rows.prefix_lengths.dtype == torch.int32
    for tree in range(shape[0]):
        length = int(places.lengths[tree])
        for row in range(shape[1]):
            flat = tree * shape[1] + row
            position, seen = int(rows.positions[flat]), int(rows.prefix_lengths[flat])
            cache_slot = int(rows.cache_slots[flat])
            if active[tree, row]:
                entry = length + int(slots[tree, row])
                block = int(places.block_tables[tree, entry // BLOCK_SIZE])
                assert (position, seen) == (length + actual.level, length)
                assert cache_slot == block * BLOCK_SIZE + entry % BLOCK_SIZE
            else:
                assert (position, seen, cache_slot, int(rows.token_ids[flat])) == (0, 0, SCRATCH_SLOT, 0)
                assert not rows.masks[tree, row].any()


@pytest.mark.parametrize("sizes", SMALL if INTERPRETED else [*SMALL, *REAL], ids=str)
def test_levels_equal_those_of_torch(sizes: Sizes) -> None:
    generator = torch.Generator().manual_seed(11)
    rules, places = random_rules(sizes, random.Random(5)), random_places(sizes, generator)
    expected = in_torch(rules, sizes)
    own_rules, own_places = on_device(rules, places)
    trees = Trees.roots(sizes.trees, sizes.kept, sizes.words, torch.device(DEVICE))
    for level in range(sizes.levels):
        logits = 3 * torch.randn(sizes.trees, trees.frontier.slots.shape[1], sizes.vocab, generator=generator)
        expected.extend(logits.double())  # rounded less, so that nearly equal nodes stand in their order
        trees = grow_level(logits.to(DEVICE), own_rules, own_places, trees, sizes.largest_tile)
        assert trees.level == level + 1
        assert_same_trees(trees, expected)
        assert_same_frontier(trees, expected, places)
    assert (trees.confidences[0] > -torch.inf).all()


def one_tree(kept: int, beam: int = 2) -> tuple[TreeRules, CachePlaces, Trees]:
    """Without noise, floor or end."""
    one, whole = torch.ones(1, dtype=torch.float64), torch.tensor([100])
    rules = TreeRules(whole, whole, one - torch.inf, one, one, None, None, beam)
    places = CachePlaces(whole, torch.zeros(1, 20, dtype=torch.int32), BLOCK_SIZE, SCRATCH_SLOT)
    return *on_device(rules, places), Trees.roots(1, kept, 1, torch.device(DEVICE))


def test_of_equally_probable_nodes_the_first_stands_first() -> None:
    rules, places, trees = one_tree(kept=6)
    trees = grow_level(torch.zeros(1, 1, 4, device=DEVICE), rules, places, trees)
    assert trees.token_ids.tolist()[0][:4] == [0, 1, 2, 3]
    certain = torch.full((1, 2, 4), -torch.inf, device=DEVICE)
    certain[0, :, 1] = 3.0
    trees = grow_level(certain, rules, places, trees)
    assert trees.confidences.tolist()[0] == pytest.approx([-math.log(4)] * 6)
    assert trees.token_ids.tolist()[0] == [0, 1, 2, 3, 1, 1]
    assert trees.parents.tolist()[0] == [0, 0, 0, 0, 1, 2]
    assert trees.frontier.slots.tolist() == [[3, 4]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("shift", [0.0, math.nan, math.inf], ids=["impossible", "nan", "infinite"])
def test_tokens_without_a_probability_become_no_nodes(shift: float) -> None:
    rules, places, trees = one_tree(kept=8)
    logits = torch.full((1, 1, 70), -torch.inf, device=DEVICE)
    logits[0, 0, 40:43] = shift
    trees = grow_level(logits, rules, places, trees, 16)
    nodes = int((trees.confidences > -torch.inf).sum())
    assert nodes == (3 if shift == 0 else 0)
    assert trees.token_ids[0, :nodes].tolist() == [40, 41, 42][:nodes]
    assert 0 <= int(trees.token_ids.min()) <= int(trees.token_ids.max()) < 70
    assert int((trees.frontier.confidences > -torch.inf).sum()) == min(nodes, 2)


@triton.jit  # type: ignore[untyped-decorator]
def _store_noise(keys, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, token = tl.program_id(0), tl.arange(0, SIZE)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    tl.store(out + row * SIZE + token, child_kernels._gumbel_noise(key, token))


def test_noise_is_that_of_the_other_services() -> None:
    keys = torch.tensor(gumbel_keys(2**64 - 1, range(20)))
    actual = torch.zeros(20, 512, dtype=torch.float64, device=DEVICE)
    _store_noise[(20,)](keys.to(DEVICE), actual, SIZE=512, enable_fp_fusion=True)
    # the logarithms may differ in the last bit, the second one's argument with them
    torch.testing.assert_close(actual.cpu(), gumbel_noise_of(keys, 512), atol=1e-14, rtol=1e-15)


def test_the_kernels_run_where_this_file_says() -> None:
    children = child_kernels._tile_kernel, child_kernels._children_kernel
    for kernel in (*children, tree_kernels._keep_kernel, tree_kernels._frontier_kernel):
        assert isinstance(kernel, InterpretedFunction) == INTERPRETED


@pytest.mark.parametrize(
    ("vocab", "best", "tile"),
    [(5, 8, 8), (4096, 16, 1024), (128_256, 16, 1024), (32_000, 64, 1024), (128_256, 64, 2048), (151_936, 256, 4096)],
)
def test_the_best_of_all_tiles_fit_a_chunk_where_they_can(vocab: int, best: int, tile: int) -> None:
    assert tile_of(vocab, best) == tile


def test_what_is_too_large_or_does_not_fit_is_refused() -> None:
    rules, places, trees = one_tree(kept=4)
    with pytest.raises(ValueError, match="at most 1048576 can be told apart"):
        grow_level(torch.empty(1, 1, MAX_VOCAB + 1, device=DEVICE), rules, places, trees)
    with pytest.raises(ValueError, match="at most 256"):
        grow_level(torch.zeros(1, 1, 9, device=DEVICE), rules, places, one_tree(kept=MAX_KEPT + 1)[2])
    with pytest.raises(ValueError, match=r"logits is torch\.float16"):
        grow_level(torch.zeros(1, 1, 9, device=DEVICE, dtype=torch.float16), rules, places, trees)
    with pytest.raises(ValueError, match="logits has shape"):
        grow_level(torch.zeros(1, 2, 9, device=DEVICE), rules, places, trees)
    noisy = replace(rules, noise_keys=rules.nodes[:, None], noisy=rules.nodes)
    with pytest.raises(ValueError, match="level 1 has none"):
        grow_level(torch.zeros(1, 1, 9, device=DEVICE), noisy, places, replace(trees, level=1))
    with pytest.raises(ValueError, match="come together"):
        TreeRules(rules.nodes, rules.depth, rules.floor, rules.temperature, rules.scale, rules.nodes[:, None], None, 2)
    with pytest.raises(ValueError, match="beam is 0"):
        TreeRules(rules.nodes, rules.depth, rules.floor, rules.temperature, rules.scale, None, None, 0)
