"""A draft is the same whether its model kept, moved, lost or never had the KV of the sequence."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from kernels.native import native_available
from runtime.kv_cache import KVCache, longest_sequence_blocks
from runtime.transformer import LoadOptions, Transformer
from services.speculator.drafter import Drafter
from services.speculator.session import DrafterSettings, DraftOrder
from speculation.calibration import Calibration
from speculation.expansion import ChildSelection
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree
from tests.tiny_models import CONTEXT, write_model

PROMPT = [7, 30, 22, 9, 151]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer.load(write_model(tmp_path_factory.mktemp("ssm")), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """The same model on PyTorch's operations."""
    return Transformer.load(write_model(tmp_path_factory.mktemp("ssm")), LoadOptions(device="cpu", kernels="torch"))


def drafter(model: Transformer, sequences: int = 4, **settings: Any) -> Drafter:
    cache = KVCache(model.config, sequences * longest_sequence_blocks(model.config), model.device, model.kv_dtype)
    values: dict[str, Any] = {
        "prefill_chunk": 1024,
        "beam": 3,
        "min_confidence": 0.0,
        "stream": 1,
        "calibration": Calibration(),
    }
    values |= settings
    return Drafter("ssm", model, cache, DrafterSettings(**values))


def order(sequence: int = 1, **fields: Any) -> DraftOrder:
    values: dict[str, Any] = {"nodes": 10, "depth": 5, "widths": (), "selection": ChildSelection.TOP} | fields
    return DraftOrder((1, sequence), **values)


def shape(tree: TokenTree) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tree.token_ids, tree.parents


def fresh_draft(model: Transformer, tokens: list[int], params: SamplingParams, wanted: DraftOrder) -> Any:
    alone = drafter(model)
    alone.open(wanted.key, tokens, len(PROMPT), params)
    return shape(alone.draft([wanted])[wanted.key])


@pytest.mark.parametrize("widths", [(), (3, 2, 1, 1)])
@pytest.mark.parametrize(
    ("params", "selection"),
    [
        (GREEDY, ChildSelection.TOP),
        (SamplingParams(seed=5), ChildSelection.SHARED_NOISE),
        (SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=5), ChildSelection.SHARED_NOISE),
        (SamplingParams(seed=5), ChildSelection.SAMPLED),
    ],
)
def test_drafts_do_not_depend_on_what_was_kept(
    widths: tuple[int, ...], params: SamplingParams, selection: ChildSelection, model: Transformer
) -> None:
    kept = drafter(model)
    wanted = order(widths=widths, selection=selection)
    kept.open(wanted.key, PROMPT, len(PROMPT), params)
    tokens = list(PROMPT)
    for step in range(6):
        tree = kept.draft([wanted])[wanted.key]
        assert shape(tree) == fresh_draft(model, tokens, params, wanted)
        deepest = max(range(len(tree)), key=lambda node: (tree.depths()[node], -node))
        path = [tree.token_ids[node] for node in tree.path(deepest)]
        accepted = [*path[: step % 4], 100 + step]  # some of a drafted path, then a token that was not drafted
        kept.advance(wanted.key, accepted)
        tokens += accepted


@pytest.mark.parametrize("widths", [(), (1, 1, 1, 1), (3, 2, 1), (2,)])
@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("nodes", [1, 7, 30])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("params", "selection"),
    [
        (GREEDY, ChildSelection.TOP),
        (SamplingParams(seed=5), ChildSelection.SHARED_NOISE),
        (SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=5), ChildSelection.SHARED_NOISE),
        (SamplingParams(temperature=0.7, min_p=0.01), ChildSelection.TOP),
    ],
    ids=["greedy", "shared-noise", "filtered", "naive"],
)
def test_the_native_loop_grows_the_tree_that_the_builders_grow(
    widths: tuple[int, ...],
    beam: int,
    nodes: int,
    scale: float,
    params: SamplingParams,
    selection: ChildSelection,
    model: Transformer,
    portable: Transformer,
) -> None:
    assert (model.grows_trees, portable.grows_trees) == (native_available(), False)
    calibration = Calibration(greedy_temperature=scale, disagreement=scale)
    settings: dict[str, Any] = {"beam": beam, "min_confidence": 0.002, "calibration": calibration}
    one, other = drafter(model, **settings), drafter(portable, **settings)
    wanted = order(widths=widths, nodes=nodes, selection=selection)
    for each in (one, other):
        each.open(wanted.key, PROMPT, len(PROMPT), params)
    for _ in range(4):
        tree, expected = (each.draft([wanted])[wanted.key] for each in (one, other))
        assert shape(tree) == shape(expected)
        assert tree.confidences == pytest.approx(expected.confidences, abs=1e-3)
        deepest = tree.depths().index(max(tree.depths()))
        accepted = [*(tree.token_ids[node] for node in tree.path(deepest)), 44]
        for each in (one, other):
            each.advance(wanted.key, accepted)


def test_the_default_models_drafts_are_nearly_always_the_builders() -> None:
    """For sampled requests, whose ranks may turn over where two scores are equal within rounding, which is that of bf16
    keys and values in the native cache: at least 90%.
    """
    folder = Path(__file__).parents[3] / "models" / "default-ssm-1"
    native, portable = (
        drafter(
            Transformer.load(folder, LoadOptions(device="cpu", kernels=kernels)), calibration=Calibration.read(folder)
        )
        for kernels in ("native", "torch")
    )
    random.seed(1)
    prompts = {seed: [random.randrange(4096) for _ in range(20)] for seed in range(100)}
    for seed, prompt in prompts.items():
        for each in (native, portable):
            each.open((1, seed), prompt, len(prompt), SamplingParams(seed=seed))
    orders = [order(seed, nodes=5, selection=ChildSelection.SHARED_NOISE) for seed in prompts]
    trees, expected = native.draft(orders), portable.draft(orders)
    assert len(trees) == len(orders)
    assert sum(shape(trees[key]) == shape(expected[key]) for key in trees) >= 0.9 * len(orders)


def draft_of(model: Transformer, params: SamplingParams, wanted: DraftOrder, **settings: Any) -> TokenTree:
    alone = drafter(model, **settings)
    alone.open(wanted.key, PROMPT, len(PROMPT), params)
    return alone.draft([wanted])[wanted.key]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0, presence_penalty=0.5)])
def test_a_surer_greedy_draft_goes_deeper_and_an_unsure_one_stops(params: SamplingParams, model: Transformer) -> None:
    """With the native loop and, for the penalty, without it."""
    trees = [
        draft_of(model, params, order(), min_confidence=0.5, calibration=Calibration(greedy_temperature=temperature))
        for temperature in (0.02, 1.0, 10.0)
    ]
    depths = [max(tree.depths()) for tree in trees]
    assert depths[0] == order().depth
    assert depths[0] > depths[1] >= depths[2] == 1


def test_scales_change_the_confidences_of_the_requests_that_they_are_for(model: Transformer) -> None:
    scaled = [Calibration(), Calibration(greedy_temperature=0.1), Calibration(disagreement=0.1)]
    naive, noisy, drawn = (
        [
            draft_of(model, SamplingParams(seed=5), order(selection=selection), calibration=calibration).confidences
            for calibration in scaled
        ]
        for selection in ChildSelection
    )
    assert naive[0] == naive[1] == naive[2]
    for confidences in (noisy, drawn):
        assert confidences[0] == confidences[1]
        assert confidences[2][1] > confidences[0][1]


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_a_draft_is_grown_behind_probable_paths_only(native: bool, model: Transformer, portable: Transformer) -> None:
    """Of the order's bound and the drafter's own the higher one holds."""
    chosen = model if native else portable
    sharp = Calibration(greedy_temperature=0.25)
    for own, asked in ((0.0, 0.2), (0.2, 0.0), (0.2, 0.01)):
        tree = draft_of(chosen, GREEDY, order(min_confidence=asked), min_confidence=own, calibration=sharp)
        grown = set(tree.parents[1:])
        assert all(tree.confidences[node] >= math.log(0.2) for node in grown)
        assert len(grown) < len(set(draft_of(chosen, GREEDY, order(), calibration=sharp).parents[1:]))


def written(drafting: Drafter) -> int:
    """Entries of the cache that have been computed."""
    return int((drafting.cache.data.abs().sum(dim=(0, 1, 3, 4)) > 0).sum())


def compute_ahead(drafting: Drafter) -> None:
    for _ in range(1000):
        if not drafting.work_ahead():
            return
    pytest.fail("there is always more to compute")


def test_texts_are_computed_ahead_in_pieces(model: Transformer) -> None:
    prompts = {(1, 1): PROMPT, (1, 2): PROMPT * 4}
    ahead = drafter(model, prefill_chunk=8)
    for key, prompt in prompts.items():
        ahead.open(key, prompt, len(prompt), GREEDY)
    whole = sum(len(prompt) - 1 for prompt in prompts.values())
    assert whole > 2 * 8
    for done in range(8, whole, 8):
        assert ahead.work_ahead()
        assert written(ahead) == done
    assert not ahead.work_ahead()
    assert written(ahead) == whole
    trees = ahead.draft([order(1), order(2)])
    assert {key: shape(tree) for key, tree in trees.items()} == {
        key: fresh_draft(model, prompt, GREEDY, order(key[1])) for key, prompt in prompts.items()
    }


def test_computing_ahead_leaves_what_others_have_yet_to_move(model: Transformer) -> None:
    busy = drafter(model)
    busy.open((1, 1), PROMPT, len(PROMPT), GREEDY)
    tree = busy.draft([order(1)])[1, 1]
    path = [tree.token_ids[node] for node in tree.path(len(tree) - 1)]
    busy.advance((1, 1), [*path, 3])
    busy.open((1, 2), PROMPT * 3, 3 * len(PROMPT), GREEDY)
    compute_ahead(busy)
    trees = busy.draft([order(1), order(2)])
    assert shape(trees[1, 1]) == fresh_draft(model, [*PROMPT, *path, 3], GREEDY, order(1))
    assert shape(trees[1, 2]) == fresh_draft(model, PROMPT * 3, GREEDY, order(2))


def test_no_draft_waits_for_long_texts(model: Transformer) -> None:
    """Of its own sequence or of another; one that is no longer than a piece is computed with its draft."""
    prompts = {(1, 1): PROMPT * 20, (1, 2): PROMPT * 7, (1, 3): PROMPT, (1, 4): PROMPT * 7}
    assert len(prompts[1, 2]) < 64 < 2 * len(prompts[1, 2])
    waiting = drafter(model, prefill_chunk=64)
    for key, prompt in prompts.items():
        waiting.open(key, prompt, len(prompt), GREEDY)
    orders = [order(number) for number in (1, 2, 3, 4)]
    assert waiting.draft(orders).keys() == {(1, 2), (1, 3)}
    waiting.advance((1, 1), [5])  # meanwhile the LLM goes on
    compute_ahead(waiting)
    before = written(waiting)
    trees = waiting.draft([order(1), order(4)])
    assert shape(trees[1, 1]) == fresh_draft(model, [*prompts[1, 1], 5], GREEDY, order(1))
    assert shape(trees[1, 4]) == fresh_draft(model, prompts[1, 4], GREEDY, order(4))
    assert written(waiting) - before <= 2 * (1 + 3 * 5) + 1, "each draft computes its tree, and what is new"


def test_what_has_no_room_is_computed_when_its_draft_has_made_some(model: Transformer) -> None:
    tight = drafter(model, sequences=1)
    prompt = PROMPT * (CONTEXT // len(PROMPT) - 2)
    for key in ((1, 1), (1, 2)):
        tight.open(key, prompt, len(prompt), GREEDY)
    for sequence in (1, 2):  # the second one's draft takes the first one's room
        wanted = order(sequence)
        tight.draft([wanted])
        compute_ahead(tight)
        assert shape(tight.draft([wanted])[wanted.key]) == fresh_draft(model, prompt, GREEDY, wanted)
    tight.open((1, 3), PROMPT * CONTEXT, len(PROMPT), GREEDY)
    assert not tight.work_ahead(), "it is longer than the model's context"


def test_what_lost_its_room_is_not_computed(model: Transformer) -> None:
    """Until it is wanted again."""
    tight = drafter(model, sequences=1, prefill_chunk=8)
    long = PROMPT * (CONTEXT // len(PROMPT) - 2)
    for key in ((1, 1), (1, 2)):
        tight.open(key, long, len(long), GREEDY)
    assert tight.work_ahead()
    assert tight.draft([order(2)]) == {}, "its text comes first, in the room that the other one had"
    compute_ahead(tight)
    assert tight.draft([order(2)]).keys() == {(1, 2)}
    assert tight.draft([order(1)]) == {}
    assert tight.work_ahead()
    tight.close((1, 1))
    assert not tight.work_ahead()


def test_a_whole_accepted_path_leaves_the_next_root_uncomputed(model: Transformer) -> None:
    kept = drafter(model, beam=8)
    wanted = order(depth=3)
    kept.open(wanted.key, PROMPT, len(PROMPT), GREEDY)
    tree = kept.draft([wanted])[wanted.key]
    path = [tree.token_ids[node] for node in tree.path(tree.children()[0][0])]
    kept.advance(wanted.key, path)  # the last token was drafted and evaluated too
    assert shape(kept.draft([wanted])[wanted.key]) == fresh_draft(model, PROMPT + path, GREEDY, wanted)


def test_sequences_of_one_batch_do_not_mix(model: Transformer) -> None:
    together = drafter(model)
    prompts = {1: PROMPT, 2: [4] * 90, 3: [8, 9]}
    for sequence, prompt in prompts.items():
        together.open((1, sequence), prompt, len(PROMPT), GREEDY)
    trees = together.draft([order(sequence) for sequence in prompts])
    for sequence, prompt in prompts.items():
        assert shape(trees[1, sequence]) == fresh_draft(model, prompt, GREEDY, order(sequence))


def test_sequences_beyond_the_cache_are_computed_again(model: Transformer) -> None:
    small = drafter(model, sequences=1)
    prompts = {sequence: [sequence] * (150 + sequence) for sequence in (1, 2, 3)}
    for sequence, prompt in prompts.items():
        small.open((1, sequence), prompt, len(PROMPT), GREEDY)
    for sequence in (1, 2, 3, 1, 2):
        tree = small.draft([order(sequence)])[1, sequence]
        assert shape(tree) == fresh_draft(model, prompts[sequence], GREEDY, order(sequence))


def test_no_draft_beyond_the_context_and_nothing_left_behind(model: Transformer) -> None:
    full = drafter(model)
    full.open((1, 1), [5] * (CONTEXT - 4), len(PROMPT), GREEDY)
    full.open((2, 1), PROMPT, len(PROMPT), GREEDY)
    assert full.draft([order(depth=5)]) == {}
    assert len(full.draft([order(depth=4)])[1, 1]) > 1
    full.close_stream(1)
    assert (1, 1) not in full
    assert (2, 1) in full
    full.close((2, 1))
    full.cache.check_idle()
