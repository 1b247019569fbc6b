"""The Triton kernels against the references, on CUDA or in Triton's interpreter: test_triton.py runs both.

Triton decides at its import which of the two it is, so that these cases need a process of their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from kernels.kv_compaction import reference as reference_compaction
from kernels.kv_compaction import triton as triton_compaction
from kernels.tree_attention import reference as reference_attention
from kernels.tree_attention import triton as triton_attention
from kernels.tree_attention.tiling import Tiling, choose_tiling
from tests.kernels.problems import Problem, Shape, make_problem

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

SMALL = [
    Shape(heads=1, kv_heads=1, head_dim=8, block_size=1, trees=((0, 1),)),
    Shape(heads=4, kv_heads=2, head_dim=20, block_size=16, trees=((1, 7), (5, 0))),
    Shape(heads=5, kv_heads=1, head_dim=80, block_size=1, trees=((13, 7), (3, 0))),
    Shape(heads=2, kv_heads=2, head_dim=256, block_size=16, trees=((70, 3),)),
    Shape(heads=16, kv_heads=2, head_dim=64, block_size=16, trees=((129, 1), (64, 1), (7, 1), (1, 1), (99, 1))),
]
LARGE = [
    Shape(heads=3, kv_heads=1, head_dim=64, block_size=16, trees=((33, 64), (0, 7), (17, 1))),
    Shape(heads=2, kv_heads=1, head_dim=128, block_size=16, trees=((16, 100), (0, 64)), words=2),
    Shape(heads=6, kv_heads=6, head_dim=48, block_size=4, trees=((9, 0), (31, 7), (0, 3)), words=2),
]
CHOSEN_BY_SHAPE = None
ONE_SPLIT = 4096
TILINGS = [CHOSEN_BY_SHAPE, Tiling(1, 16, ONE_SPLIT), Tiling(16, 32, ONE_SPLIT), Tiling(4, 16, 32), Tiling(1, 32, 32)]
# Prefixes of several of the splits that the kernel chooses itself.
LONG = [
    Shape(heads=2, kv_heads=1, head_dim=64, block_size=16, trees=((700, 9), (255, 3), (256, 2), (20, 1))),
    Shape(heads=2, kv_heads=2, head_dim=128, block_size=16, trees=((513, 65), (300, 0)), words=2),
]
CASES = [
    *((shape, tiling) for shape in SMALL for tiling in TILINGS),
    *((shape, tiling) for shape in LARGE for tiling in (CHOSEN_BY_SHAPE, Tiling(16, 32, 64))),
    *((shape, CHOSEN_BY_SHAPE) for shape in LONG),
]
# The interpreter multiplies the bits of bfloat16 as if they were integers.
HALF_DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_equals_reference(problem: Problem, tiling: Tiling | None, tolerance: float) -> None:
    expected = reference_attention.tree_attention(*problem.arguments())
    actual = triton_attention.tree_attention(*problem.to(DEVICE).arguments(), tiling=tiling)
    assert actual.dtype == problem.query.dtype
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_the_kernels_run_where_this_file_says() -> None:
    for kernel in (triton_attention._tree_attention_kernel, triton_compaction._kv_compaction_kernel):
        assert isinstance(kernel, InterpretedFunction) == INTERPRETED


@pytest.mark.parametrize(("shape", "tiling"), CASES, ids=str)
def test_attention_in_every_tiling(shape: Shape, tiling: Tiling | None) -> None:
    assert_equals_reference(make_problem(shape), tiling, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_attention_in_half_precision(shape: Shape, dtype: torch.dtype) -> None:
    assert_equals_reference(make_problem(replace(shape, dtype=dtype)), None, TOLERANCE[dtype])


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_row_that_sees_nothing_gets_zeros(tiling: Tiling | None) -> None:
    problem = make_problem(Shape(heads=2, kv_heads=1, head_dim=8, block_size=4, trees=((30, 5),)))
    problem.prefix_lengths[1], problem.masks[1] = 0, 0
    assert_equals_reference(problem, tiling, TOLERANCE[torch.float32])
    assert triton_attention.tree_attention(*problem.to(DEVICE).arguments(), tiling=tiling)[1].eq(0).all()


def test_no_rows_give_no_rows() -> None:
    problem = make_problem(SMALL[1]).to(DEVICE)
    empty = replace(
        problem,
        query=problem.query[:0],
        row_sequences=problem.row_sequences[:0],
        prefix_lengths=problem.prefix_lengths[:0],
        masks=problem.masks[:0],
    )
    assert triton_attention.tree_attention(*empty.arguments()).shape == (0, 4, 20)


@pytest.mark.parametrize("shape", [SMALL[1], LARGE[2], *LONG], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_others(shape: Shape) -> None:
    """Nor on how many splits the batch's longest sequence needs. Tiles of one height: see the kernel's docstring."""
    problem = make_problem(shape).to(DEVICE)
    tiling = replace(choose_tiling(1, 1, shape.heads, shape.kv_heads, shape.head_dim * 4), tile_rows=8)
    together = triton_attention.tree_attention(*problem.arguments(), tiling=tiling)
    for row in range(0, len(together), 1 + len(together) // 7):
        only = slice(row, row + 1)
        sequence = int(problem.row_sequences[row])
        seen = int(problem.prefix_lengths[row]) + 64 * shape.words
        alone = replace(
            problem,
            query=problem.query[only],
            block_tables=problem.block_tables[sequence : sequence + 1, : 1 + seen // shape.block_size].contiguous(),
            row_sequences=torch.zeros_like(problem.row_sequences[only]),
            prefix_lengths=problem.prefix_lengths[only],
            masks=problem.masks[only],
        )
        assert torch.equal(triton_attention.tree_attention(*alone.arguments(), tiling=tiling)[0], together[row])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_compaction_of_few_moves_needs_no_condition(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 12))
    targets = data.draw(st.lists(st.integers(0, slots - 1), unique=True))
    sources = data.draw(st.lists(st.integers(0, slots - 1), min_size=len(targets), max_size=len(targets)))
    kv_heads, head_dim = data.draw(st.sampled_from([(1, 1), (2, 20), (3, 64)]))
    cache = torch.randn(2, 2, slots, kv_heads, head_dim).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    assert_compacts_alike(cache, sources, targets)


def test_compaction_of_many_moves_towards_the_front() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 2, 400, 2, 8, generator=generator)
    sources = sorted(torch.randperm(400, generator=generator)[:100].tolist())
    assert_compacts_alike(cache, sources, list(range(100)))


def assert_compacts_alike(cache: torch.Tensor, sources: list[int], targets: list[int]) -> None:
    expected, actual = cache.clone(), cache.to(DEVICE, copy=True)
    moves = torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
    reference_compaction.kv_compaction(expected, *moves)
    triton_compaction.kv_compaction(actual, *(move.to(DEVICE) for move in moves))
    assert torch.equal(actual.cpu(), expected)
