"""Padded steps on static buffers against the steps that they stand for: called here, captured where there is a GPU."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch

from kernels.backend import RequestedName
from runtime.batch import FlatBatch, Segment
from runtime.kv_cache import BLOCK_SIZE, CachedSequence, KVCache
from runtime.step_graph import (
    MAX_ROWS,
    Compute,
    StaticBatch,
    StepGraphs,
    StepShape,
    bucket,
    plain_call,
    without_collection,
)
from runtime.transformer import LoadOptions, Transformer
from speculation.tree import TokenTree
from tests.tiny_models import VOCAB, write_model

BACKENDS: list[RequestedName] = ["native", "torch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen3")


def load(folder: Path, kernels: RequestedName, device: str = "cpu") -> Transformer:
    return Transformer.load(folder, LoadOptions(device=device, kernels=kernels))


def random_tree(chance: random.Random, nodes: int) -> TokenTree:
    parents = [-1, *(chance.randrange(node) for node in range(1, nodes))]
    return TokenTree(tuple(chance.sample(range(VOCAB), nodes)), tuple(parents))


class Recorded:
    """A capture that counts, and calls."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, compute: Compute) -> Compute:
        self.captures += 1
        compute()  # as a capture does: it must write to the scratch slot alone
        return compute


def tree_segment(cache: KVCache, sequence: CachedSequence, tree: TokenTree, start: int) -> Segment:
    cache.reserve(sequence, start + len(tree))
    return Segment.tree(sequence, tree.token_ids, tree.depths(), tree.ancestor_masks(), start)


def run_steps(
    model: Transformer,
    cache: KVCache,
    graphs: StepGraphs | None,
    seed: int = 0,
    sizes: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 21, 30),
) -> list[torch.Tensor]:
    """Sequences that arrive, prefill in chunks and decode trees of all sizes in the same steps; logits of each step."""
    chance = random.Random(seed)
    sequences = [(CachedSequence(), chance.randint(1, 70)) for _ in range(5)]
    results = []
    for size in sizes:
        segments: list[Segment] = []
        for index, (sequence, prompt) in enumerate(sequences[: chance.randint(1, 5)]):
            if sequence.length < prompt:
                tokens = [chance.randrange(VOCAB) for _ in range(min(40, prompt - sequence.length))]
                cache.reserve(sequence, sequence.length + len(tokens))
                segments.append(Segment.chain(sequence, tokens, sequence.length))
                sequence.length += len(tokens)
            if sequence.length == prompt:
                tree = random_tree(chance, size if index else 2 * size + 5)  # masks of one word and of two
                segments.append(tree_segment(cache, sequence, tree, prompt))
        rows = sum(len(segment.token_ids) for segment in segments)
        wanted = chance.sample(range(rows), chance.choice([0, rows // 2, rows]))
        if graphs is None:
            results.append(model.step(segments, wanted, cache).clone())
        else:
            shape = graphs.shape_of(segments)
            assert shape is not None
            results.append(graphs.step(shape, segments, wanted).clone())
    return results


@pytest.mark.parametrize("kernels", BACKENDS)
def test_padded_steps_equal_unpadded_ones(folder: Path, kernels: RequestedName) -> None:
    model = load(folder, kernels)
    caches = [KVCache(model.config, 64, model.device, model.kv_dtype) for _ in range(2)]
    capture = Recorded()
    graphs = StepGraphs(model, caches[1], capture)
    for seed in range(3):
        expected, actual = run_steps(model, caches[0], None, seed), run_steps(model, caches[1], graphs, seed)
        kv = [cache.data[:, :, : cache.scratch_slot] for cache in caches]
        for ours, theirs in zip([*actual, kv[1]], [*expected, kv[0]], strict=True):
            if kernels == "native":
                assert torch.equal(ours, theirs), "the native kernels promise equal bits"
            else:
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for cache in caches:
            cache._free = list(range(cache.blocks - 1, -1, -1))  # the next seed starts over
    assert capture.captures == len(graphs.shapes) == len(set(graphs.shapes)) < 3 * 8


def test_a_shape_is_captured_once_and_its_buffers_stay(folder: Path) -> None:
    model = load(folder, "native")
    cache = KVCache(model.config, 8, model.device, model.kv_dtype)
    capture = Recorded()
    graphs = StepGraphs(model, cache, capture)
    sequence = CachedSequence()
    cache.reserve(sequence, 32)
    addresses = set()
    for start in range(6):
        segment = Segment.chain(sequence, [start], start)
        shape = graphs.shape_of([segment])
        assert shape is not None
        addresses.add(graphs.step(shape, [segment], [0]).data_ptr())
    assert capture.captures == len(addresses) == 1


def test_steps_too_large_to_pad_are_left_to_others(folder: Path) -> None:
    model = load(folder, "native")
    cache = KVCache(model.config, 64, model.device, model.kv_dtype)
    graphs = StepGraphs(model, cache, plain_call)
    sequence = CachedSequence()
    cache.reserve(sequence, MAX_ROWS + 1)
    assert graphs.shape_of([Segment.chain(sequence, [1] * MAX_ROWS, 0)]) is not None
    assert graphs.shape_of([Segment.chain(sequence, [1] * (MAX_ROWS + 1), 0)]) is None
    assert graphs.shape_of([]) is None
    cache.reserve(sequence, 64 * BLOCK_SIZE)  # more blocks than a context and its largest tree
    assert graphs.shape_of([Segment.chain(sequence, [1], 0)]) is None


def test_buckets_follow_rows_closely_and_the_rest_loosely() -> None:
    assert bucket(1, 1, 3, 0, 4096) == StepShape(1, 1, 64, 1)
    assert bucket(9, 1, 65, 1, 4096) == StepShape(16, 1, 256, 1)
    assert bucket(33, 5, 257, 2, 4096) == StepShape(64, 16, 1024, 4)
    assert bucket(3, 3, 1025, 1, 2000) == StepShape(4, 4, 2000, 1)


def test_no_step_behind_a_short_context_captures_once_all_are_prepared(folder: Path) -> None:
    model = load(folder, "native")
    cache = KVCache(model.config, 64, model.device, model.kv_dtype)
    capture = Recorded()
    graphs = StepGraphs(model, cache, capture)
    shapes = graphs.prepare(sequences=6)
    assert capture.captures == shapes == len(set(graphs.shapes))
    assert not cache.data[:, :, : cache.scratch_slot].any(), "captures write to the scratch slot alone"
    sequences = [CachedSequence() for _ in range(6)]
    for sequence in sequences:
        cache.reserve(sequence, 3 * BLOCK_SIZE)
    for count in range(1, 7):
        for size in range(1, 10):
            trees = [random_tree(random.Random(size), 1 + (size + place) % 9) for place in range(count)]
            segments = [tree_segment(cache, sequences[place], tree, 5) for place, tree in enumerate(trees)]
            shape = graphs.shape_of(segments)
            assert shape is not None
            graphs.step(shape, segments, [0])
    long = Segment.chain(sequences[0], [1] * 40, 5)
    shape = graphs.shape_of([long])
    assert shape is not None
    graphs.step(shape, [long], [39])
    assert capture.captures == shapes


def test_padding_sees_nothing_and_writes_to_the_scratch_slot() -> None:
    shape = StepShape(rows=8, sequences=4, blocks=64, words=4)
    static = StaticBatch(shape, torch.device("cpu"), scratch_slot=999)
    sequences = [CachedSequence(blocks=[5, 2, 7]), CachedSequence(blocks=[9])]
    wide = Segment.tree(sequences[0], [1, 2, 3], [0, 1, 2], [1, 3, 1 | 1 << 200], 20)
    static.fill([wide, Segment.chain(sequences[1], [4, 5, 6, 7], 0)], wanted=[2, 6])
    static.fill([wide, Segment.chain(sequences[1], [4], 3)], wanted=[2])  # nothing of the first is left behind
    given = FlatBatch.of([wide, Segment.chain(sequences[1], [4], 3)], torch.device("cpu"))
    batch = static.batch
    for name in ("token_ids", "positions", "slots", "row_sequences", "prefix_lengths", "masks"):
        assert torch.equal(getattr(batch, name)[:4], getattr(given, name)), name
    assert torch.equal(batch.block_tables[:2, :3], given.block_tables)
    assert batch.slots[4:].eq(999).all()
    assert batch.row_sequences[4:].eq(1).all()
    assert not batch.prefix_lengths[4:].any()
    assert not batch.masks[4:].any()
    assert static.wanted.tolist() == [2, 0, 0, 0, 0, 0, 0, 0]


def test_nothing_is_collected_during_a_capture() -> None:
    class Graph:
        def __init__(self) -> None:
            self.itself = self
            weakref.finalize(self, destroyed.append, True)

    def capture_failing() -> None:
        with without_collection():
            Graph()
            containers = [[number] for number in range(1000)]  # each may start a collection
            assert len(containers) == 1000
            assert not destroyed
            raise RuntimeError("in a capture")

    before, thresholds = gc.isenabled(), gc.get_threshold()
    gc.set_threshold(1)
    try:
        for enabled in (True, False):
            destroyed: list[bool] = []
            (gc.enable if enabled else gc.disable)()
            with pytest.raises(RuntimeError, match="in a capture"):
                capture_failing()
            assert gc.isenabled() == enabled
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if before else gc.disable)()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_steps_equal_eager_ones_on_the_gpu(folder: Path) -> None:
    model = load(folder, "triton", "cuda")
    captured = model.new_cache(0.1, 4, blocks=64)
    graphs = model._graphs
    assert graphs is not None
    eager = KVCache(model.config, 64, model.device, model.kv_dtype)
    expected, actual = run_steps(model, eager, None), run_steps(model, captured, graphs)
    assert graphs.shapes
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trees_on_the_gpu_have_the_logits_of_plain_decoding(folder: Path) -> None:
    """To the bit, in bfloat16: among any other sequences, at any place in the tree, captured or called."""
    model = Transformer.load(folder, LoadOptions(device="cuda", dtype="bfloat16", kernels="triton"))
    cache = model.new_cache(0.1, 8, blocks=300)
    chance = random.Random(0)
    for prompt in (3, 40, 150):
        tokens = [chance.randrange(VOCAB) for _ in range(prompt)]
        trees = [random_tree(chance, nodes) for nodes in (1, 7, 30, 64)]
        prompts = [CachedSequence() for _ in range(len(trees) + 1)]
        for sequence in prompts:
            cache.reserve(sequence, prompt + 70)
            model.step([Segment.chain(sequence, tokens, 0)], [], cache)
        segments = [tree_segment(cache, sequence, tree, prompt) for sequence, tree in zip(prompts, trees, strict=False)]
        rows = sum(map(len, trees))
        together = model.step(segments, range(rows), cache).clone()
        assert together.shape == (rows, VOCAB)
        first = 0
        for tree in trees:
            for node in {0, len(tree) // 2, len(tree) - 1}:
                path = [node]
                while tree.parents[path[0]] >= 0:
                    path.insert(0, tree.parents[path[0]])
                for depth, step in enumerate(path):
                    plain = tree_segment(cache, prompts[-1], TokenTree((tree.token_ids[step],), (-1,)), prompt + depth)
                    logits = model.step([plain], [0], cache)[0]
                    assert torch.equal(logits, together[first + step]), (prompt, len(tree), depth)
                # A sequence that gave its blocks back is computed once more: prompt and output in one chunk.
                again = CachedSequence()
                cache.reserve(again, prompt + len(path))
                whole = [*tokens, *(tree.token_ids[step] for step in path)]
                logits = model.step([Segment.chain(again, whole, 0, decoded_from=prompt)], [len(whole) - 1], cache)[0]
                assert torch.equal(logits, together[first + node]), "computed once more"
                cache.release(again)
            first += len(tree)
