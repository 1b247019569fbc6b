"""All levels in one: called here, captured where there is a GPU. The trees are those that are grown level by level."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.draft_loop.native import ChildRule
from runtime.kv_cache import BLOCK_SIZE, KVCache, longest_sequence_blocks
from runtime.step_graph import Capture, Compute, plain_call
from runtime.transformer import LoadOptions, Transformer
from services.speculator.drafter import Drafter
from services.speculator.graph_growth import GrowthGraphs
from services.speculator.session import DrafterSettings, DraftOrder
from speculation.calibration import Calibration
from speculation.children import ChildSelection
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree
from tests.tiny_models import CONTEXT, VOCAB, write_model

GREEDY = SamplingParams(temperature=0)
TOP, NOISE = ChildSelection.TOP, ChildSelection.SHARED_NOISE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer.load(write_model(tmp_path_factory.mktemp("ssm")), LoadOptions(device="cpu", kernels="torch"))


def drafter(model: Transformer, capture: Capture | None, sequences: int = 8, **settings: Any) -> Drafter:
    blocks = sequences * longest_sequence_blocks(model.config)
    cache = KVCache(model.config, blocks, model.device, model.kv_dtype)
    values: dict[str, Any] = {"beam": 3, "min_confidence": 0.002, "calibration": Calibration(0.5, 0.5)} | settings
    return Drafter("ssm", model, cache, DrafterSettings(prefill_chunk=1024, stream=1, **values), capture)


def order(sequence: int, **fields: Any) -> DraftOrder:
    values: dict[str, Any] = {"nodes": 10, "depth": 5, "widths": (), "selection": TOP} | fields
    return DraftOrder((1, sequence), **values)


def shape(tree: TokenTree) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tree.token_ids, tree.parents


def assert_same_drafts(
    captured: Drafter,
    by_level: Drafter,
    wanted: dict[int, tuple[SamplingParams, DraftOrder]],
    steps: int,
    longest_prompt: int = 39,
) -> None:
    """Of sequences that begin with prompts of many lengths and accept some of each tree."""
    chance = random.Random(3)
    for sequence, (params, _) in wanted.items():
        prompt = [chance.randrange(VOCAB) for _ in range(chance.randint(1, longest_prompt))]
        for each in (captured, by_level):
            each.open((1, sequence), prompt, len(prompt), params)
    for _ in range(steps):
        orders = [own for _, own in wanted.values()]
        trees, expected = captured.draft(orders), by_level.draft(orders)
        assert trees.keys() == expected.keys() == {own.key for own in orders}
        for key, tree in trees.items():
            assert shape(tree) == shape(expected[key])
            assert tree.confidences == pytest.approx(expected[key].confidences, abs=1e-4)
            path = [tree.token_ids[node] for node in tree.path(chance.randrange(len(tree)))]
            accepted = [*path, chance.randrange(VOCAB)]
            for each in (captured, by_level):
                each.advance(key, accepted)


@pytest.mark.parametrize("beam", [1, 2, 5, 16])
@pytest.mark.parametrize("nodes", [1, 7, 30])
@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize(
    ("params", "selection"),
    [
        (GREEDY, TOP),
        (SamplingParams(seed=5), NOISE),
        (SamplingParams(temperature=0.7, seed=2**64 - 1), NOISE),
        (SamplingParams(temperature=0.7), TOP),
    ],
    ids=["greedy", "noise", "cooler", "naive"],
)
def test_trees_are_those_grown_level_by_level(
    params: SamplingParams, selection: ChildSelection, floor: float, nodes: int, beam: int, model: Transformer
) -> None:
    settings: dict[str, Any] = {"beam": beam, "min_confidence": floor}
    wanted = {1: (params, order(1, nodes=nodes, selection=selection, depth=6))}
    assert_same_drafts(drafter(model, plain_call, **settings), drafter(model, None, **settings), wanted, steps=4)


def test_sequences_of_all_kinds_grow_together(model: Transformer) -> None:
    wanted = {
        1: (GREEDY, order(1, nodes=3, depth=2)),
        2: (SamplingParams(seed=8), order(2, selection=NOISE, depth=1)),
        3: (SamplingParams(temperature=0.5), order(3, nodes=17, min_confidence=0.01)),
        4: (SamplingParams(seed=9, temperature=1.4), order(4, nodes=1, selection=NOISE)),
        5: (SamplingParams(seed=9, top_k=5), order(5, selection=NOISE)),
        6: (GREEDY, order(6, widths=(2, 1))),
        7: (SamplingParams(seed=3), order(7, selection=ChildSelection.SAMPLED)),
    }
    capture = Recorded()
    assert_same_drafts(drafter(model, capture), drafter(model, None), wanted, steps=5)
    assert capture.captures == 1, "those of the first four, in one; the others level by level"


def test_more_sequences_than_a_step_has_rows_for(model: Transformer) -> None:
    count = 40
    wanted = {number: (GREEDY, order(number, nodes=5, depth=2)) for number in range(1, count + 1)}
    settings: dict[str, Any] = {"beam": 10, "sequences": count}
    capture = Recorded()
    assert_same_drafts(drafter(model, capture, **settings), drafter(model, None, **settings), wanted, steps=2)
    assert capture.captures == 2, "parts of 25 and 15"


def test_a_draft_may_reserve_more_than_a_context_and_the_largest_tree(model: Transformer) -> None:
    settings: dict[str, Any] = {"beam": 30, "min_confidence": 0.0}
    captured, by_level = drafter(model, plain_call, **settings), drafter(model, None, **settings)
    wanted, prompt = order(1, nodes=200, depth=8), [5] * (CONTEXT - 10)
    for each in (captured, by_level):
        each.open(wanted.key, prompt, len(prompt), GREEDY)
    assert len(prompt) + 30 * 8 + 200 > longest_sequence_blocks(model.config) * BLOCK_SIZE
    assert shape(captured.draft([wanted])[wanted.key]) == shape(by_level.draft([wanted])[wanted.key])


def test_a_shape_is_captured_once_without_a_trace_in_the_cache(model: Transformer) -> None:
    captured = drafter(model, capture := Recorded())
    capture.before = lambda: captured.cache.data[:, :, : captured.cache.scratch_slot].clone()
    for sequence in (1, 2, 3):
        captured.open((1, sequence), [7, 30, sequence], 3, GREEDY)
    one, other, third = order(1), order(2, nodes=5, depth=7), order(3)
    for orders in ([one], [other], [third], [one, other, third], [one, third]):
        captured.draft(orders)
    assert capture.captures == 2, "one sequence, and up to four"


def test_no_usual_draft_captures_once_all_are_prepared(model: Transformer) -> None:
    drafting = drafter(model, capture := Recorded())
    capture.before = lambda: drafting.cache.data[:, :, : drafting.cache.scratch_slot].clone()
    assert drafting.capture_drafts(4) == capture.captures == 2 * 3 * 4 * 2, "counts, nodes, levels, noise"
    assert drafter(model, None).capture_drafts(4) == 0
    for sequence, selection in enumerate((TOP, NOISE, TOP), start=1):
        drafting.open((1, sequence), [7, 30, sequence], 3, SamplingParams(seed=2) if selection is NOISE else GREEDY)
    before = capture.captures
    for nodes in (1, 11, 63):
        for depth in (1, 5, 8):
            drafting.draft([order(1, nodes=nodes, depth=depth)])
            drafting.draft([order(1, nodes=nodes, depth=depth), order(2, depth=depth, selection=NOISE), order(3)])
    assert capture.captures == before


@pytest.mark.parametrize(("beam", "depths"), [(31, 4), (32, 3), (64, 2)])
def test_what_no_mask_is_long_enough_for_is_not_prepared(beam: int, depths: int, model: Transformer) -> None:
    drafting = drafter(model, capture := Recorded(), beam=beam)
    assert drafting.capture_drafts(1) == capture.captures == 3 * depths * 2, "nodes, levels, noise"
    drafting.open((1, 1), [7, 30, 5], 3, GREEDY)
    assert len(drafting.draft([order(1, nodes=63, depth=8)])[1, 1]) > 1, "level by level, where it must"
    assert capture.captures == 3 * depths * 2


class Recorded:
    """A capture that counts, and calls."""

    def __init__(self) -> None:
        self.captures = 0
        self.before: Callable[[], torch.Tensor] | None = None

    def __call__(self, compute: Compute) -> Compute:
        self.captures += 1
        kept = self.before() if self.before is not None else None
        compute()  # as a capture does: it must write to the scratch slot alone
        if kept is not None and self.before is not None:
            assert torch.equal(self.before(), kept)
        return compute


def test_what_is_static_filtered_or_drawn_is_left_to_others(model: Transformer) -> None:
    cache = KVCache(model.config, 8, model.device, model.kv_dtype)
    settings = DrafterSettings(prefill_chunk=64, beam=2, min_confidence=0, stream=1, calibration=Calibration())
    graphs = GrowthGraphs(model, cache, settings, plain_call)
    assert graphs.takes(order(1), ChildRule(noise_seed=3, scale=0.4, temperature=0.7))
    assert not graphs.takes(order(1, widths=(2,)), ChildRule())
    assert not graphs.takes(order(1, depth=200), ChildRule()), "over 256 slots"
    for rule in (ChildRule(top_k=4), ChildRule(top_p=0.9), ChildRule(min_p=0.1)):
        assert not graphs.takes(order(1), rule)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_trees_are_those_grown_level_by_level_on_the_gpu(tmp_path: Path) -> None:
    model = Transformer.load(write_model(tmp_path), LoadOptions(device="cuda", kernels="triton"))
    model.new_cache(0.1, 4, blocks=64)
    assert model.capture is not None
    captured, by_level = drafter(model, model.capture), drafter(model, None)
    wanted = {
        1: (GREEDY, order(1, nodes=9)),
        2: (SamplingParams(seed=8), order(2, selection=NOISE)),
        3: (SamplingParams(temperature=0.5), order(3, nodes=17, depth=3)),
    }
    chance = random.Random(1)
    for sequence, (params, _) in wanted.items():
        for each in (captured, by_level):
            each.open((1, sequence), [5, 9, sequence], 3, params)
    same = 0
    for _ in range(20):
        orders = [own for _, own in wanted.values()]
        trees, expected = captured.draft(orders), by_level.draft(orders)
        same += sum(shape(trees[key]) == shape(expected[key]) for key in trees)
        for key in trees:
            token = chance.randrange(VOCAB)
            captured.advance(key, [token])
            by_level.advance(key, [token])
    assert same >= 57, "of 60: products of other row counts may round otherwise"
