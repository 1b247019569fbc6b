"""Tree attention of every implementation against one row, head and key at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.blocks import TreeAttention
from kernels.tree_attention import native, reference
from tests.kernels.problems import Shape, make_problem, obvious_attention, visible_slots

SHAPES = [
    Shape(heads=1, kv_heads=1, head_dim=8, block_size=1, trees=((0, 1),)),
    Shape(heads=4, kv_heads=2, head_dim=20, block_size=16, trees=((1, 7), (5, 0))),
    Shape(heads=3, kv_heads=1, head_dim=64, block_size=16, trees=((33, 64), (0, 7), (17, 1))),
    Shape(heads=5, kv_heads=1, head_dim=80, block_size=1, trees=((13, 7), (3, 0))),
    Shape(heads=8, kv_heads=1, head_dim=128, block_size=16, trees=((16, 100), (0, 64)), words=2),
    Shape(heads=6, kv_heads=6, head_dim=48, block_size=4, trees=((9, 0), (31, 7), (0, 3)), words=2),
]


IMPLEMENTATIONS = [reference.tree_attention, native.tree_attention]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: Shape, attention: TreeAttention) -> None:
    problem = make_problem(shape)
    torch.testing.assert_close(
        attention(*problem.arguments()).double(), obvious_attention(problem), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_reads_a_bfloat16_cache(shape: Shape) -> None:
    problem = make_problem(shape)
    narrow = replace(problem, keys=problem.keys.bfloat16(), values=problem.values.bfloat16())
    torch.testing.assert_close(
        native.tree_attention(*narrow.arguments()).double(), obvious_attention(narrow), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_rows_do_not_depend_on_the_others(shape: Shape) -> None:
    problem = make_problem(shape)
    together = native.tree_attention(*problem.arguments())
    for row in range(len(together)):
        only = slice(row, row + 1)
        alone = replace(
            problem,
            query=problem.query[only],
            row_sequences=problem.row_sequences[only],
            prefix_lengths=problem.prefix_lengths[only],
            masks=problem.masks[only],
        )
        assert torch.equal(native.tree_attention(*alone.arguments())[0], together[row])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_tree_nodes_have_the_bits_of_plain_sequences(shape: Shape) -> None:
    problem = make_problem(shape)
    together = native.tree_attention(*problem.arguments())
    for row in range(len(together)):
        slots = visible_slots(problem, row)
        plain = replace(
            problem,
            query=problem.query[row : row + 1],
            block_tables=torch.tensor([slots], dtype=torch.int32),
            block_size=1,
            row_sequences=torch.zeros(1, dtype=torch.int32),
            prefix_lengths=torch.tensor([len(slots)], dtype=torch.int32),
            masks=torch.zeros(1, 1, dtype=torch.int64),
        )
        assert torch.equal(native.tree_attention(*plain.arguments())[0], together[row])


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
