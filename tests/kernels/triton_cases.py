"""The Triton kernels against the references, on CUDA or in Triton's interpreter: test_triton.py runs both.

Triton decides at its import which of the two it is, so that these cases need a process of their own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from kernels.backend import choose_backend
from kernels.blocks import AttentionBatch, AttentionWeights, HeadNorms, MlpWeights
from kernels.kv_compaction import reference as reference_compaction
from kernels.kv_compaction import triton as triton_compaction
from kernels.rms_norm import reference as reference_norm
from kernels.rms_norm import triton as triton_norm
from kernels.rotated_write import reference as reference_write
from kernels.rotated_write import triton as triton_write
from kernels.tree_attention import reference as reference_attention
from kernels.tree_attention import triton as triton_attention
from kernels.tree_attention.own_entries_kernel import own_entries_kernel
from kernels.tree_attention.split_kernel import split_kernel
from kernels.tree_attention.tiling import OWN_LAG, Splits, Tiling, choose_tiling
from runtime.kv_cache import KVCache
from runtime.step_graph import StepGraphs, plain_call
from runtime.transformer import LoadOptions, Transformer
from speculation.children import ChildSelection
from speculation.sampling import SamplingParams
from tests.kernels import test_decoder_blocks as layers
from tests.kernels.problems import Problem, Shape, make_problem, visible_slots
from tests.runtime.test_step_graph import run_steps
from tests.services.speculator.test_graph_growth import assert_same_drafts, drafter, order
from tests.tiny_models import write_model

T = TypeVar("T", AttentionWeights, MlpWeights, AttentionBatch)
GPU = torch.device("cuda")
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
    Shape(heads=2, kv_heads=1, head_dim=128, block_size=16, trees=((16, 66), (0, 9)), words=2),
    Shape(heads=6, kv_heads=6, head_dim=48, block_size=4, trees=((9, 0), (31, 7), (0, 3)), words=2),
]
CHOSEN_BY_SHAPE = None
ONE_SPLIT = Splits(4096, 0, 1)
SMALL_SPLITS = Splits(32, 0, 1)
# The splits of a tile's rows differ, where it holds rows of several sequences.
GROWING = Splits(32, 2, 1)
TILINGS = [
    CHOSEN_BY_SHAPE,
    Tiling(1, 16, ONE_SPLIT),
    Tiling(16, 32, ONE_SPLIT),
    Tiling(4, 16, SMALL_SPLITS),
    Tiling(1, 32, SMALL_SPLITS),
    Tiling(8, 16, GROWING),
]
WIDE_TILINGS = [CHOSEN_BY_SHAPE, Tiling(16, 32, Splits(64, 0, 1)), Tiling(16, 32, GROWING)]
# Prefixes of several of the splits that the kernel chooses itself.
LONG = [
    Shape(heads=2, kv_heads=1, head_dim=64, block_size=16, trees=((700, 9), (255, 3), (256, 2), (20, 1))),
    Shape(heads=4, kv_heads=4, head_dim=8, block_size=16, trees=((1100, 2), (20, 0))),
    Shape(heads=1, kv_heads=1, head_dim=128, block_size=16, trees=((513, 65), (130, 0)), words=2),
]
CASES = [
    *((shape, tiling) for shape in SMALL for tiling in TILINGS),
    *((shape, tiling) for shape in LARGE for tiling in WIDE_TILINGS),
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
    for kernel in (
        split_kernel,
        own_entries_kernel,
        triton_compaction._kv_compaction_kernel,
        triton_norm._rms_norm_kernel,
        triton_write._rotated_write_kernel,
    ):
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


def one_height(shape: Shape) -> Tiling | None:
    """The interpreter's products, which are NumPy's, may add up otherwise for tiles of another height."""
    if not INTERPRETED:
        return None
    return replace(choose_tiling(1, 1, shape.heads, shape.kv_heads, shape.head_dim * 4), tile_rows=8)


def half_on_gpu(shape: Shape) -> Shape:
    """The type whose products run on tensor cores, where there are some."""
    return shape if INTERPRETED else replace(shape, dtype=torch.bfloat16)


# The last one takes the interpreter half a minute.
@pytest.mark.parametrize("shape", [SMALL[1], LARGE[2], LONG[0], LONG[-1]][: 3 if INTERPRETED else 4], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_others(shape: Shape) -> None:
    """Nor on how many splits the batch's longest sequence needs, nor on the height of the tiles."""
    problem = make_problem(half_on_gpu(shape)).to(DEVICE)
    tiling = one_height(shape)
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


@pytest.mark.parametrize("prefix", [3, 130] if INTERPRETED else [0, 3, 31, 127, 130, 515, 1023, 2045, 5000])
@pytest.mark.parametrize(("heads", "kv_heads", "words"), [(4, 1, 1), (2, 2, 2)])
def test_a_node_gets_the_bits_that_it_gets_when_its_path_is_accepted(
    prefix: int, heads: int, kv_heads: int, words: int
) -> None:
    """Plain decoding: a tree of one node, whose ancestors are entries of the prefix."""
    nodes = 20 if words == 1 else 70
    shape = Shape(heads, kv_heads, head_dim=64, block_size=16, trees=((prefix, nodes), (20, 3)), words=words)
    problem = make_problem(half_on_gpu(shape)).to(DEVICE)
    tiling = one_height(shape)
    together = triton_attention.tree_attention(*problem.arguments(), tiling=tiling)
    depths = set()
    for node in range(nodes - 1, -1, -(nodes // 5) if INTERPRETED else -1):
        slots = visible_slots(problem, node)
        depths.add(len(slots) - prefix)
        keys, values = problem.keys.clone(), problem.values.clone()
        # The sequence's first blocks hold the path now, one entry behind the other.
        table = problem.block_tables[0].tolist()
        for entry, slot in enumerate(slots):
            place = table[entry // 16] * 16 + entry % 16
            keys[place], values[place] = problem.keys[slot], problem.values[slot]
        accepted = replace(
            problem,
            query=problem.query[node : node + 1].contiguous(),
            keys=keys,
            values=values,
            block_tables=problem.block_tables[:1].contiguous(),
            row_sequences=problem.row_sequences[:1],
            prefix_lengths=torch.full_like(problem.prefix_lengths[:1], len(slots) - 1),
            masks=torch.ones_like(problem.masks[:1]) * torch.tensor([1] + [0] * (words - 1), device=DEVICE),
        )
        assert torch.equal(triton_attention.tree_attention(*accepted.arguments(), tiling=tiling)[0], together[node])
    assert max(depths) >= 4
    assert max(depths) <= OWN_LAG, "the promise ends here"


# Where a rounding may fall the other way. The interpreter cuts bfloat16 off instead, at each of two roundings.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2 if INTERPRETED else 8e-3}
WRITES = [(0, 2, 1, 8), (1, 1, 1, 2), (5, 6, 2, 20), (3, 4, 4, 64), (2, 2, 1, 128), (2, 20, 5, 16)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 60), (2, 288), (5, 1024), (1, 4100)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    hidden, weight = (3 * torch.randn(rows, size)).to(dtype), (torch.rand(size) + 0.5).to(dtype)
    expected = reference_norm.rms_norm(hidden, weight, 1e-5)
    actual = triton_norm.rms_norm(hidden.to(DEVICE), weight.to(DEVICE), 1e-5)
    torch.testing.assert_close(actual.cpu(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), WRITES)
def test_rotated_write(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normed: bool) -> None:
    slots = torch.randperm(9)[:rows]
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.rand(rows, head_dim // 2) * 6
    query_norm, key_norm = (torch.rand(2, head_dim) + 0.5).to(dtype)
    norms = HeadNorms(query_norm, key_norm, eps=1e-5) if normed else None
    on_device = HeadNorms(norms.query.to(DEVICE), norms.key.to(DEVICE), norms.eps) if norms else None
    expected_kv = torch.full((2, 9, kv_heads, head_dim), float("nan"), dtype=dtype)
    actual_kv = expected_kv.to(DEVICE, copy=True)
    expected = reference_write.rotated_write(qkv, expected_kv, slots, angles.cos(), angles.sin(), norms)
    rotation = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    actual = triton_write.rotated_write(qkv.to(DEVICE), actual_kv, slots.to(DEVICE), *rotation, on_device)
    tolerance = 4 * ROUNDING[dtype]
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual_kv.cpu(), expected_kv, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("layer", [layers.LAYERS[1], layers.LAYERS[3]], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_equals_torch(layer: layers.Layer, residual: bool) -> None:
    attention, mlp = layers.attention_weights(layer), layers.mlp_weights(layer)
    caches = layers.empty_kv(layer), layers.empty_kv(layer).to(DEVICE)
    reference, triton_backend = choose_backend(torch.device("cpu"), "torch"), choose_backend(GPU)
    assert triton_backend.name == "triton"
    for batch in (layers.prompt_batch(layer, 0, 13), layers.tree_batch(layer, 13, layers.PARENTS)):
        hidden = torch.randn(batch.rows, layer.hidden)
        own = hidden.to(DEVICE, copy=True)
        expected = reference.pack_attention(attention)(hidden, caches[0], batch, residual=residual)
        expected = reference.pack_mlp(mlp)(expected, residual=residual)
        own = triton_backend.pack_attention(moved(attention))(own, caches[1], moved(batch), residual=residual)
        own = triton_backend.pack_mlp(moved(mlp))(own, residual=residual)
        torch.testing.assert_close(own.cpu(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(caches[1].cpu(), caches[0], atol=1e-5, rtol=1e-4, equal_nan=True)


def moved(arguments: T) -> T:
    """The dataclass with its tensors on the device."""
    tensors = {name: item.to(DEVICE) for name, item in vars(arguments).items() if isinstance(item, torch.Tensor)}
    return replace(arguments, **tensors)  # type: ignore[arg-type]  # a mapping has lost which field is which


def with_torch_and_triton(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Transformer, Transformer]:
    """The same model on PyTorch's operations and on every Triton kernel."""
    write_model(folder, "qwen3")
    reference = Transformer.load(folder, LoadOptions(device="cpu", kernels="torch"))
    monkeypatch.setattr("runtime.transformer.choose_backend", lambda *_, **__: choose_backend(GPU, "triton"))
    model = Transformer.load(folder, LoadOptions(device=DEVICE, dtype="float32"))
    assert model.backend.name == "triton"
    return reference, model


def test_drafts_grown_in_one_go_equal_those_of_torch_level_by_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = with_torch_and_triton(tmp_path, monkeypatch)
    wanted = {
        1: (SamplingParams(temperature=0), order(1, nodes=6, depth=2)),
        2: (SamplingParams(seed=8), order(2, selection=ChildSelection.SHARED_NOISE, depth=2)),
    }
    assert_same_drafts(drafter(model, plain_call), drafter(reference, None), wanted, steps=2, longest_prompt=6)


def test_padded_steps_of_a_model_equal_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel in its place, on the shapes that are captured in graphs."""
    reference, model = with_torch_and_triton(tmp_path, monkeypatch)
    caches = [KVCache(m.config, 64, m.device, torch.float32) for m in (reference, model)]
    seed, sizes = 475, (1, 6)  # few rows, of prompts and trees: 16 and 24
    expected = run_steps(reference, caches[0], None, seed, sizes)
    actual = run_steps(model, caches[1], StepGraphs(model, caches[1], plain_call), seed, sizes)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)


def test_a_wide_cache_takes_narrow_projections() -> None:
    """And the other way round: keys and values are rounded to the cache's type."""
    qkv, slots, flat = torch.randn(2, 4 * 8), torch.tensor([1, 0]), torch.zeros(2, 4)
    for dtype, cache_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        kv = torch.zeros(2, 2, 1, 8, dtype=cache_dtype, device=DEVICE)
        rows = qkv.to(dtype)
        moved = rows.to(DEVICE), kv, slots.to(DEVICE), (flat + 1).to(DEVICE), flat.to(DEVICE), None
        query = triton_write.rotated_write(*moved).cpu()
        heads = rows.view(2, 4, 8)
        assert torch.equal(query, heads[:, :2])
        expected = heads[:, 2:].transpose(0, 1).to(cache_dtype)
        torch.testing.assert_close(kv.cpu()[:, slots, 0], expected, atol=0, rtol=ROUNDING[torch.bfloat16])


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
    reference_compaction.kv_compaction(expected, sources, targets)
    triton_compaction.kv_compaction(actual, sources, targets)
    assert torch.equal(actual.cpu(), expected)
