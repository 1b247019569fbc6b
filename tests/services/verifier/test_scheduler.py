"""Who takes part in a step, with how many rows, and who gives way when KV blocks run out."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from runtime.config import ModelConfig, read_config
from runtime.kv_cache import BLOCK_SIZE, KVCache
from services.verifier.request import GenerationRequest, StepOutput
from services.verifier.scheduler import Scheduler, SchedulerSettings, SequencePlan
from services.verifier.sequence import Sequence
from speculation.logits import LogitsPipeline
from speculation.sampling import SamplingParams
from tests.tiny_models import CONTEXT, VOCAB

SETTINGS = SchedulerSettings(max_sequences=4, max_step_rows=64, prefill_chunk=20, draft_nodes=8, draft_depth=5)
_ids = itertools.count(1)


@pytest.fixture(scope="module")
def config(llm: Path) -> ModelConfig:
    return read_config(llm)


def scheduler(config: ModelConfig, blocks: int = 100, **settings: int) -> Scheduler:

    cache = KVCache(config, blocks, torch.device("cpu"), torch.float32)
    return Scheduler(dataclasses.replace(SETTINGS, **settings), cache, CONTEXT)


def sequence(prompt: int, new_tokens: int = 50) -> Sequence:
    def sink(output: StepOutput | Exception) -> None:
        raise AssertionError(f"the scheduler sends nothing, but here is {output}")

    params = SamplingParams(temperature=0)
    tokens = tuple(range(1, prompt + 1))
    request = GenerationRequest("request", tokens, params, new_tokens)
    return Sequence(next(_ids), request, sink, LogitsPipeline(params, tokens, VOCAB))


def step(scheduler: Scheduler, accepted: int = 1) -> list[SequencePlan]:
    """Plan a step and do to the sequences what the engine does: compute the chunk, then accept some tokens."""
    plans = scheduler.plan()
    for plan in plans:
        plan.sequence.cache.length = plan.chunk_end
        if plan.decodes:
            plan.sequence.cache.length += accepted
            plan.sequence.append((1,) * accepted)
            scheduler.cache.trim(plan.sequence.cache)
    return plans


def test_a_long_prompt_comes_in_chunks_and_its_last_step_drafts(config: ModelConfig) -> None:
    one = scheduler(config)
    one.add(sequence(prompt=46))
    chunks = [step(one)[0] for _ in range(4)]
    assert [plan.chunk_end for plan in chunks] == [20, 40, 45, 46]
    assert [plan.decodes for plan in chunks] == [False, False, True, True]
    assert [plan.draft_nodes for plan in chunks] == [0, 0, 8, 8]


def test_decoding_comes_before_new_prompts_and_the_rows_are_bounded(config: ModelConfig) -> None:
    full = scheduler(config, max_step_rows=30, draft_nodes=0)
    full.add(sequence(prompt=5))
    step(full)
    full.add(sequence(prompt=100))
    full.add(sequence(prompt=100))
    plans = step(full)
    assert [plan.chunk_end for plan in plans] == [5, 20, 9]
    assert [plan.decodes for plan in plans] == [True, False, False]


@pytest.mark.parametrize(("rows", "nodes"), [(64, 8), (36, 8), (35, 7), (8, 1), (7, 0), (4, 0)])
def test_drafts_share_the_rows_that_are_left(rows: int, nodes: int, config: ModelConfig) -> None:
    shared = scheduler(config, max_step_rows=rows)
    for _ in range(4):
        shared.add(sequence(prompt=1))
    plans = step(shared)
    assert [plan.draft_nodes for plan in plans] == [nodes] * 4
    assert all(plan.decodes for plan in plans)


def test_drafts_take_rows_behind_prompts(config: ModelConfig) -> None:
    busy = scheduler(config, max_step_rows=30)
    busy.add(sequence(prompt=1))
    step(busy)
    busy.add(sequence(prompt=60))
    decoding, prefilling = step(busy)
    assert (decoding.draft_nodes, prefilling.chunk_end) == (8, 20)
    busy.add(sequence(prompt=60))
    assert [plan.draft_nodes for plan in step(busy)] == [0, 0, 0], "two chunks leave no row"


def test_drafts_take_only_free_blocks(config: ModelConfig) -> None:
    # After two steps each sequence fills two blocks with its root; four of the five blocks are theirs.
    tight = scheduler(config, blocks=5, draft_nodes=20)
    for _ in range(2):
        tight.add(sequence(prompt=2 * BLOCK_SIZE - 1))
    for _ in range(2):
        step(tight)
    plans = tight.plan()
    assert [plan.draft_nodes for plan in plans] == [BLOCK_SIZE, 0]
    assert tight.take_preemptions() == 0
    assert all(len(plan.sequence.cache.blocks) * BLOCK_SIZE > plan.chunk_end + plan.draft_nodes for plan in plans)


def test_a_request_without_speculation_has_no_draft(config: ModelConfig) -> None:
    both = scheduler(config)
    plain = sequence(prompt=3)
    plain.request = dataclasses.replace(plain.request, speculative=False)
    both.add(plain)
    both.add(sequence(prompt=3))
    assert [plan.draft_nodes for plan in step(both)] == [0, 8]


def test_no_draft_reaches_beyond_the_limit_or_the_context(config: ModelConfig) -> None:
    near = scheduler(config)
    near.add(sequence(prompt=3, new_tokens=3))
    assert [step(near)[0].draft_depth for _ in range(3)] == [2, 1, 0]
    at_end = scheduler(config)
    at_end.add(sequence(prompt=CONTEXT - 2, new_tokens=2))
    plans = [step(at_end)[0] for _ in range(14)]
    decoding = [plan for plan in plans if plan.decodes]
    assert decoding[0].draft_depth == 1
    assert decoding[1].draft_depth == 0


def test_the_youngest_gives_way_and_comes_back_first(config: ModelConfig) -> None:
    # Eight blocks; three sequences of two blocks each grow into a third.
    tight = scheduler(config, blocks=8, draft_nodes=0)
    old, middle, young = (sequence(prompt=2 * BLOCK_SIZE - 1) for _ in range(3))
    for each in (old, middle, young):
        tight.add(each)
    for _ in range(2):
        step(tight)
    assert tight.running == [old, middle, young]
    while len(tight.running) == 3:
        step(tight)
    assert tight.running == [old, middle]
    assert list(tight.waiting) == [young]
    assert young.cache.blocks == []
    assert tight.take_preemptions() == 1
    tight.add(sequence(prompt=3))
    tight.remove(middle)
    assert young in [plan.sequence for plan in step(tight)]
    assert tight.take_preemptions() == 0
    for each in [*tight.running, *tight.waiting]:
        tight.remove(each)
    tight.cache.check_idle()
