"""Tree attention of every implementation against one row, head and key at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.blocks import TreeAttention
from kernels.native import multiplies_in_tiles
from kernels.tree_attention import native, reference
from tests.kernels.problems import Problem, Shape, make_problem, mask_words, obvious_attention, visible_slots

SHAPES = [
    Shape(heads=1, kv_heads=1, head_dim=8, block_size=1, trees=((0, 1),)),
    Shape(heads=4, kv_heads=2, head_dim=20, block_size=16, trees=((1, 7), (5, 0))),
    Shape(heads=3, kv_heads=1, head_dim=64, block_size=16, trees=((33, 64), (0, 7), (17, 1))),
    Shape(heads=5, kv_heads=1, head_dim=80, block_size=1, trees=((13, 7), (3, 0))),
    Shape(heads=8, kv_heads=1, head_dim=128, block_size=16, trees=((16, 100), (0, 64)), words=2),
    Shape(heads=6, kv_heads=6, head_dim=48, block_size=4, trees=((9, 0), (31, 7), (0, 3)), words=2),
]
# What matrix tiles take, where there are any: whole ones of a head, of the entries of a block, of a key head's queries.
TILE_SHAPES = [
    Shape(heads=3, kv_heads=1, head_dim=64, block_size=16, trees=((33, 64), (0, 7), (17, 1), (40, 0), (127, 30))),
    Shape(heads=8, kv_heads=1, head_dim=128, block_size=16, trees=((16, 100), (0, 64), (47, 0)), words=2),
    Shape(heads=32, kv_heads=2, head_dim=96, block_size=32, trees=((70, 20), (31, 3), (12, 0))),
    Shape(heads=4, kv_heads=4, head_dim=32, block_size=16, trees=((70, 64), (300, 20))),
]


IMPLEMENTATIONS = [reference.tree_attention, native.tree_attention]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: Shape, attention: TreeAttention) -> None:
    problem = make_problem(shape)
    torch.testing.assert_close(
        attention(*problem.arguments()).double(), obvious_attention(problem), atol=2e-5, rtol=1e-4
    )


def narrow(shape: Shape, seed: int = 0) -> Problem:
    problem = make_problem(shape, seed)
    return replace(problem, keys=problem.keys.bfloat16(), values=problem.values.bfloat16())


@pytest.mark.parametrize("shape", SHAPES + TILE_SHAPES, ids=str)
def test_native_reads_a_bfloat16_cache(shape: Shape) -> None:
    problem = narrow(shape)
    expected = obvious_attention(problem)
    # tiles take queries and weights as bf16 numbers, whose error is a 512th
    in_tiles = multiplies_in_tiles() and shape.head_dim % 32 == 0 and shape.block_size % 16 == 0
    tolerance = 2e-2 if in_tiles else 2e-5
    actual = native.tree_attention(*problem.arguments())
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=1e-4)


def only(problem: Problem, rows: slice) -> Problem:
    return replace(
        problem,
        query=problem.query[rows],
        row_sequences=problem.row_sequences[rows],
        prefix_lengths=problem.prefix_lengths[rows],
        masks=problem.masks[rows],
    )


PROBLEMS = [*map(make_problem, SHAPES), *map(narrow, SHAPES + TILE_SHAPES)]
IDS = [f"{problem.keys.dtype}-{list(problem.query.shape)}" for problem in PROBLEMS]


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_native_rows_do_not_depend_on_the_others(problem: Problem) -> None:
    together = native.tree_attention(*problem.arguments())
    for rows in (1, 3):
        parts = [slice(first, first + rows) for first in range(0, len(together), rows)]
        apart = [native.tree_attention(*only(problem, part).arguments()) for part in parts]
        assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_native_tree_nodes_have_the_bits_of_plain_sequences(problem: Problem) -> None:
    """What a node sees, one entry behind the other in a cache of its own, as plain decoding has it."""
    together = native.tree_attention(*problem.arguments())
    for row in range(len(together)):
        slots = visible_slots(problem, row)
        blocks = -(-len(slots) // problem.block_size)
        cache = torch.zeros((2, blocks * problem.block_size, *problem.keys.shape[1:]), dtype=problem.keys.dtype)
        cache[0, : len(slots)], cache[1, : len(slots)] = problem.keys[slots], problem.values[slots]
        plain = replace(
            only(problem, slice(row, row + 1)),
            keys=cache[0],
            values=cache[1],
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            row_sequences=torch.zeros(1, dtype=torch.int32),
            prefix_lengths=torch.tensor([len(slots)], dtype=torch.int32),
            masks=torch.zeros_like(problem.masks[:1]),
        )
        assert torch.equal(native.tree_attention(*plain.arguments())[0], together[row])


def test_native_rows_that_see_an_entry_at_different_places_do_not_share_it() -> None:
    """Masks that no tree has: what a row sees is all that counts."""
    problem = narrow(Shape(heads=2, kv_heads=1, head_dim=32, block_size=16, trees=((5, 40),)))
    bits = [int(bit) for bit in torch.randint(1, 2**40, (40,), generator=torch.Generator().manual_seed(0))]
    masks = torch.tensor([mask_words(mask, 1) for mask in bits])
    problem = replace(problem, masks=masks)
    together = native.tree_attention(*problem.arguments())
    torch.testing.assert_close(together.double(), obvious_attention(problem), atol=2e-2, rtol=1e-4)
    for row in range(len(together)):
        alone = only(problem, slice(row, row + 1))
        assert torch.equal(native.tree_attention(*alone.arguments())[0], together[row])


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_a_row_that_sees_nothing_gets_zeros(attention: TreeAttention) -> None:
    problem = make_problem(Shape(heads=2, kv_heads=1, head_dim=8, block_size=4, trees=((3, 2),)))
    problem.prefix_lengths[1], problem.masks[1] = 0, 0
    output = attention(*problem.arguments())
    assert output[1].eq(0).all()
    assert output[0].ne(0).all()


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_bit_63_is_a_node_like_any_other(attention: TreeAttention) -> None:
    problem = make_problem(Shape(heads=1, kv_heads=1, head_dim=8, block_size=16, trees=((2, 64),)))
    assert (problem.masks < 0).any()
    torch.testing.assert_close(
        attention(*problem.arguments()).double(), obvious_attention(problem), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_wrong_types_are_named(attention: TreeAttention) -> None:
    problem = make_problem(Shape(heads=1, kv_heads=1, head_dim=8, block_size=16, trees=((2, 4),)))
    arguments = list(problem.arguments())
    arguments[5] = problem.row_sequences.long()
    with pytest.raises(ValueError, match=r"row_sequences is torch\.int64; it must be torch\.int32"):
        attention(*arguments)  # type: ignore[arg-type]  # a list has lost the types of its places
