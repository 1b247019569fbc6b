"""Trees grown together are, bit for bit, those grown alone; children are those of the rules of `speculation`."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.draft_loop.native import ChildRule, DraftSequence, GrownTree, TreeBounds
from kernels.native import set_num_threads
from runtime.batch import Segment
from runtime.kv_cache import CachedSequence, KVCache
from runtime.transformer import LoadOptions, Transformer
from speculation.children import ChildPolicy, ChildSelection, rank_children
from speculation.logits import LogitsPipeline
from speculation.sampling import SamplingParams
from tests.tiny_models import VOCAB, write_model

RULES = [
    ChildRule(),
    ChildRule(scale=0.4),
    ChildRule(temperature=0.7, noise_seed=5, scale=0.8),
    ChildRule(temperature=1.3, top_k=7, top_p=0.8, min_p=0.05, noise_seed=2**63 + 1),
]
BOUNDS = [
    TreeBounds(nodes=5, depth=5, beam=2),
    TreeBounds(nodes=1, depth=1, beam=1),
    TreeBounds(nodes=0, depth=3, beam=2),
    TreeBounds(nodes=40, depth=7, beam=12, floor=-6.0),
    TreeBounds(nodes=12, depth=3, beam=1, widths=(3, 2, 2)),
]

DRAFT_WITHOUT_NUMBERS = """
import sys
from pathlib import Path
from kernels.draft_loop.native import ChildRule, DraftSequence, TreeBounds
from runtime.kv_cache import KVCache
from runtime.transformer import LoadOptions, Transformer

model = Transformer.load(Path(sys.argv[1]), LoadOptions(device="cpu"))
cache = KVCache(model.config, 12, model.device, model.kv_dtype)
bounds = TreeBounds(nodes=5, depth=5, beam=2)
for rule in (ChildRule(), ChildRule(top_p=0.8), ChildRule(top_k=7), ChildRule(temperature=0.5, noise_seed=3)):
    (tree,) = model.grow_trees(cache, [DraftSequence(range(12), 0, [5, 6], bounds, rule)])
    print(list(tree.token_ids))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer.load(write_model(tmp_path_factory.mktemp("ssm")), LoadOptions(device="cpu"))


def sequences(model: Transformer, count: int, seed: int) -> tuple[KVCache, list[DraftSequence]]:
    """With prefixes of many lengths in the cache, and several pending tokens."""
    random.seed(seed)
    cache = KVCache(model.config, 12 * count, model.device, model.kv_dtype)
    wanted: list[DraftSequence] = []
    for _ in range(count):
        tokens = [random.randrange(VOCAB) for _ in range(random.randrange(1, 60))]
        cached = CachedSequence()
        cache.reserve(cached, 12 * 16)
        start = random.randrange(len(tokens))
        if start:
            nothing_grows = TreeBounds(nodes=0, depth=1, beam=1)
            model.grow_trees(cache, [DraftSequence(cached.blocks, 0, tokens[:start], nothing_grows, ChildRule())])
        bounds, rule = random.choice(BOUNDS), random.choice(RULES)
        wanted.append(DraftSequence(cached.blocks, start, tokens[start:], bounds, rule))
    return cache, wanted


def listed(tree: GrownTree) -> list[list[float]]:
    return [list(part) for part in vars(tree).values()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_trees_of_one_call_do_not_depend_on_each_other(count: int, threads: int, model: Transformer) -> None:
    set_num_threads(threads)
    for seed in range(5):
        cache, wanted = sequences(model, count, seed)
        together = [listed(tree) for tree in model.grow_trees(cache, wanted)]
        random.shuffle(order := list(range(count)))
        for index in order:
            (alone,) = model.grow_trees(cache, [wanted[index]])
            assert listed(alone) == together[index]
    set_num_threads(2)


def test_workers_sleep_as_soon_as_the_trees_are_grown(model: Transformer) -> None:
    """The large model has the machine next. Otherwise each worker would look for another loop for 50 microseconds."""
    cache, wanted = sequences(model, 8, 3)
    burnt = {threads: burnt_behind(lambda: model.grow_trees(cache, wanted), threads) for threads in (1, 2)}
    assert burnt[2] < burnt[1] + 35e-6


def burnt_behind(call: Callable[[], object], threads: int) -> float:
    """Median processor time of the process in two milliseconds of sleep behind a call, seconds."""
    set_num_threads(threads)
    burnt: list[float] = []
    for _ in range(300):
        call()
        before = time.process_time()
        time.sleep(0.002)
        burnt.append(time.process_time() - before)
    return statistics.median(burnt)


def test_slots_tell_where_each_token_stands_below_its_parent(model: Transformer) -> None:
    """A node of the tree that was evaluated is found by its path."""
    cache, wanted = sequences(model, 30, 8)
    for sequence, tree in zip(wanted, model.grow_trees(cache, wanted), strict=True):
        assert tree.slot_tokens[0] == sequence.pending[-1]
        assert list(tree.slot_parents[:1]) == [-1]
        assert all(0 <= parent < slot for slot, parent in enumerate(tree.slot_parents[1:], start=1))
        edges = list(zip(tree.slot_parents, tree.slot_tokens, strict=True))
        assert len(set(edges)) == len(edges) <= sequence.bounds.most_slots
        places = {0: 0}
        for node in set(tree.parents[1:]) - {0}:
            places[node] = edges.index((places[tree.parents[node]], tree.token_ids[node]))
        assert len(set(places.values())) == len(places)


@pytest.mark.parametrize("selection", [ChildSelection.TOP, ChildSelection.SHARED_NOISE])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, seed=9),
        SamplingParams(temperature=1e-30),
        SamplingParams(top_k=1),
        SamplingParams(top_k=40, seed=3),
        SamplingParams(top_p=0.9, temperature=1.5),
        SamplingParams(top_p=1e-6),
        SamplingParams(top_p=0.999, temperature=4),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=100, top_p=0.95, min_p=0.01, temperature=0.8, seed=2**64 - 1),
    ],
)
def test_children_are_those_of_the_pipeline_and_the_ranking(
    params: SamplingParams, selection: ChildSelection, model: Transformer
) -> None:
    """The first level of a tree against `rank_children` on the same logits."""
    cache, wanted = sequences(model, 25, 11)
    noisy = selection is ChildSelection.SHARED_NOISE
    policy = ChildPolicy(selection, params.seed, disagreement=0.5)
    seed, scale = (params.seed, policy.disagreement) if noisy else (None, 1.0)
    rule = ChildRule(params.temperature, params.top_k, params.top_p, params.min_p, seed, scale)
    bounds = TreeBounds(nodes=9, depth=1, beam=1)
    trees = model.grow_trees(cache, [replace(sequence, bounds=bounds, rule=rule) for sequence in wanted])
    pipeline = LogitsPipeline(params, [], VOCAB)
    for sequence, tree in zip(wanted, trees, strict=True):
        log_probs = pipeline.draft_log_probs(last_logits(model, cache, sequence))
        position = sequence.length + len(sequence.pending)
        (tokens,), (confidences,) = rank_children(policy, log_probs, position, 9).tolist()
        expected = [(token, value) for token, value in zip(tokens, confidences, strict=True) if value > -torch.inf]
        assert list(tree.token_ids[1:]) == [token for token, _ in expected]
        # a confidence far below e^-87 is as good as none
        assert list(tree.confidences[1:]) == pytest.approx([value for _, value in expected], rel=1e-4, abs=2e-5)


def test_logits_that_are_no_numbers_have_no_children(tmp_path: Path) -> None:
    """In a process of its own, where no earlier call has left candidates in the memory that is read."""
    weights = load_file((folder := write_model(tmp_path / "ssm")) / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors")
    command = [sys.executable, "-c", DRAFT_WITHOUT_NUMBERS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[6]"] * 4 + [""]


def last_logits(model: Transformer, cache: KVCache, sequence: DraftSequence) -> torch.Tensor:
    cached = CachedSequence(list(sequence.blocks), sequence.length)
    segment = Segment.chain(cached, sequence.pending, sequence.length)
    return model.step([segment], [len(sequence.pending) - 1], cache)
