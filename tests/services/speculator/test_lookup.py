"""Sessions of look-up: what they find, what they leave behind, and what they do not."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from services.speculator.lookup import INDEXED_AT_ONCE, OUTPUT_PIECE, LookupSource, OutputLookup, PromptLookup
from services.speculator.session import DraftOrder, SessionKey
from speculation.children import ChildSelection
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree
from tests.speculation.trees import token_paths

PARAMS = SamplingParams(temperature=0)
PROMPT = [5, 6, 7, 8, 9]
OUTPUT = [10, 11, 12, 13, 14]
KEY, OTHER = (1, 1), (2, 1)


def order(key: SessionKey = KEY, **fields: Any) -> DraftOrder:
    values: dict[str, Any] = {"nodes": 8, "depth": 4, "widths": (), "selection": ChildSelection.TOP} | fields
    return DraftOrder(key, **values)


def draft(source: LookupSource, key: SessionKey = KEY, **fields: Any) -> TokenTree:
    return source.draft([order(key, **fields)])[key]


def speak(source: LookupSource, key: SessionKey = KEY, output: list[int] = OUTPUT, **fields: Any) -> None:
    """Open a sequence, draft for it once, let it say `output` and close it."""
    source.open(key, PROMPT, len(PROMPT), PARAMS)
    draft(source, key, **fields)
    source.advance(key, output)
    source.close(key)


def random_tokens(count: int) -> list[int]:
    return torch.randint(0, 30_000, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def test_the_prompt_and_the_output_so_far_are_looked_up() -> None:
    source = PromptLookup(0.02)
    source.open(KEY, [1, 2, 3, 4, 9, 1, 2], 7, PARAMS)
    assert token_paths(draft(source))[1:] == [(3,), (3, 4), (3, 4, 9), (3, 4, 9, 1)]
    source.advance(KEY, [7, 7, 8, 2, 7])
    assert token_paths(draft(source, depth=2))[1:] == [(7,), (7, 8)]
    source.advance(KEY, [30])
    assert len(draft(source)) == 1
    assert draft(source).source == "prompt-lookup"


def test_prompts_of_one_token_and_paths_below_the_floor_give_the_root_alone() -> None:
    for source in (PromptLookup(0.02), OutputLookup(0.02, 100)):
        source.open(KEY, [3], 1, PARAMS)
        assert draft(source).token_ids == (3,)
    doubtful = PromptLookup(0.9)
    doubtful.open(KEY, [1, 2, 3, 1, 2], 5, PARAMS)
    assert len(draft(doubtful)) == 1


def test_prompts_of_other_sequences_are_never_looked_up() -> None:
    for source in (PromptLookup(0.0), OutputLookup(0.0, 1000)):
        source.open(KEY, [1, 2, 3, 4, 5, 6], 6, PARAMS)
        draft(source)
        source.advance(KEY, [7])
        source.close(KEY)
        source.open(OTHER, [1, 2, 3], 3, PARAMS)
        assert len(draft(source, OTHER)) == 1


def test_outputs_outlive_their_sequence_for_the_sequences_of_all_streams() -> None:
    source = OutputLookup(0.02, 1000)
    speak(source)
    source.open(OTHER, PROMPT, len(PROMPT), PARAMS)
    assert draft(source, OTHER, depth=5).token_ids == (PROMPT[-1], *OUTPUT)
    assert draft(source, OTHER).source == "suffix-index"
    source.close_stream(OTHER[0])
    assert OTHER not in source


def test_long_outputs_are_found_before_they_end() -> None:
    source = OutputLookup(0.02, 10_000)
    output = random_tokens(OUTPUT_PIECE)
    source.open(KEY, PROMPT, len(PROMPT), PARAMS)
    draft(source)
    source.advance(KEY, output[:-1])
    source.open(OTHER, [*PROMPT, *output[:9]], len(PROMPT), PARAMS)
    assert len(draft(source, OTHER)) == 1
    source.advance(KEY, output[-1:])
    assert draft(source, OTHER).token_ids == tuple(output[8:13])


def test_a_sequence_that_leaves_in_the_middle_or_is_opened_again_is_indexed_once() -> None:
    source = OutputLookup(0.02, 1000)
    source.open(KEY, PROMPT, len(PROMPT), PARAMS)
    draft(source)
    source.advance(KEY, OUTPUT[:3])
    source.open(KEY, [*PROMPT, *OUTPUT[:3]], len(PROMPT), PARAMS)
    draft(source)
    source.advance(KEY, OUTPUT[3:])
    source.close_stream(KEY[0])
    pieces = 2 * (1 + len(PROMPT)) + len(OUTPUT[:3]) + len(OUTPUT)  # a separator and the context of each
    assert len(source.index) == pieces
    source.close(KEY)
    assert len(source.index) == pieces


def test_sampled_drafts_leave_no_traces() -> None:
    """Neither text nor experience, which a repetition with the same seed and noise would meet."""
    sampled: dict[str, Any] = {"selection": ChildSelection.SAMPLED}
    source = OutputLookup(0.0, 1000)
    speak(source)
    source.open(OTHER, PROMPT, len(PROMPT), PARAMS)
    before = draft(source, OTHER, **sampled)
    assert len(before) > 1
    size = len(source.index)
    for _ in range(5):
        speak(source, output=[10, 30, 31], **sampled)
    after = draft(source, OTHER, **sampled)
    assert (after.token_ids, after.confidences, len(source.index)) == (before.token_ids, before.confidences, size)
    speak(source, output=[10, 30, 31])
    assert draft(source, OTHER, **sampled).token_ids != before.token_ids


def test_experience_of_one_sequence_serves_the_next() -> None:
    source = PromptLookup(0.0)
    text = [1, 2, 3, 1, 2]
    surer = []
    for key in ((1, sequence) for sequence in range(20)):
        source.open(key, text, len(text), PARAMS)
        surer.append(draft(source, key).confidences[1])
        source.advance(key, [3])
    assert surer == sorted(surer)
    assert surer[-1] > surer[0]


def test_what_is_evicted_between_draft_and_answer_hurts_nobody() -> None:
    source = OutputLookup(0.02, 50)
    speak(source)
    source.open(OTHER, PROMPT, len(PROMPT), PARAMS)
    assert len(draft(source, OTHER)) > 1
    speak(source, output=random_tokens(200))
    source.advance(OTHER, OUTPUT[:2])
    assert len(draft(source, OTHER)) == 1
    assert len(source.index) == 50


def test_a_long_prompt_stalls_nobody() -> None:
    """It is indexed over several steps; beside it, what is short is indexed at once."""
    source = PromptLookup(0.02)
    long = random_tokens(32_768)
    started = time.perf_counter()
    source.open(KEY, [*long, *long[100:110]], len(long) + 10, PARAMS)
    source.open(OTHER, [1, 2, 3, 1, 2], 5, PARAMS)
    slowest = time.perf_counter() - started
    steps = 0
    trees: dict[SessionKey, TokenTree] = {}
    while steps == 0 or len(trees[KEY]) == 1:
        started = time.perf_counter()
        trees = source.draft([order(KEY), order(OTHER)])
        slowest = max(slowest, time.perf_counter() - started)
        assert trees[OTHER].token_ids[:2] == (2, 3)
        steps += 1
    assert steps <= 2  # the place looked for is near the beginning
    assert trees[KEY].token_ids == tuple(long[109:114])
    for _ in range(len(long) // INDEXED_AT_ONCE):
        source.draft([order(KEY)])
    source.advance(KEY, long[32_700:32_710])
    assert draft(source).token_ids == tuple(long[32_709:32_714])
    assert slowest < 0.2  # about 6 ms on an idle machine


@pytest.mark.parametrize("source", [PromptLookup(0.02), OutputLookup(0.02, 10)])
def test_closing_what_is_not_open_does_nothing(source: LookupSource) -> None:
    source.close(KEY)
    source.close_stream(1)
    assert source.draft([]) == {}
