"""All draft sources behind one service: budgets, sessions, and the distribution of what is sampled with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from services.common.drafting import (
    AdvanceSequence,
    DraftRequest,
    OpenSequence,
    SpeculateRequest,
    SpeculateResponse,
)
from services.speculator.checks import InvalidMessage
from services.speculator.draft_service import DraftService
from services.speculator.lookup import OutputLookup, PromptLookup
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.session import DraftOrder, SessionKey
from services.speculator.sources import DraftSource
from speculation.acceptance import AcceptanceRule
from speculation.children import ChildPolicy, ChildSelection
from speculation.expansion import BestFirstExpansion
from speculation.merge import MergedDraft, merge_trees
from speculation.sampling import SamplingParams
from speculation.suffix_index import SEPARATOR
from speculation.tree import TokenTree
from tests.speculation.models import exact_joint, grow, markov_model, perturbed, step
from tests.speculation.statistics import ALPHA, chi_square_p_value

MSS = AcceptanceRule.MSS
LLM = markov_model(1)
VOCAB = len(LLM)
PROMPT = [0, 1, 2, 0, 1, 3, 0, 2, 1, 0, 3, 3, 0, 1, 0]
SAMPLED = ChildSelection.SAMPLED


class MarkovSource:
    """A small model that knows the last token only, and what it was asked for."""

    def __init__(self, name: str, model: torch.Tensor, stream: int) -> None:
        self.name = name
        self.model = model
        self.stream = stream
        self.sessions: dict[SessionKey, tuple[list[int], SamplingParams]] = {}
        self.orders: list[DraftOrder] = []

    def __contains__(self, key: SessionKey) -> bool:
        return key in self.sessions

    def open(self, key: SessionKey, tokens: Sequence[int], prompt_length: int, params: SamplingParams) -> None:
        self.sessions[key] = (list(tokens), params)

    def work_ahead(self) -> bool:
        return False

    def advance(self, key: SessionKey, token_ids: Sequence[int]) -> None:
        self.sessions[key][0].extend(token_ids)

    def close(self, key: SessionKey) -> None:
        self.sessions.pop(key, None)

    def close_stream(self, stream: int) -> None:
        for key in [key for key in self.sessions if key[0] == stream]:
            self.close(key)

    def draft(self, orders: Iterable[DraftOrder]) -> dict[SessionKey, TokenTree]:
        self.orders = list(orders)
        return {order.key: self._grow(order) for order in self.orders}

    def _grow(self, order: DraftOrder) -> TokenTree:
        tokens, params = self.sessions[order.key]
        policy = ChildPolicy(order.selection, params.seed, self.stream)
        bounds = {"max_nodes": order.nodes, "max_depth": order.depth}
        return grow(BestFirstExpansion(tokens[-1], len(tokens), policy, **bounds, source=self.name), self.model)


def build(sources: Sequence[str], vocab_size: int | None = VOCAB) -> tuple[DraftService, list[MarkovSource]]:
    models = [
        MarkovSource(name, perturbed(LLM, seed), seed) for name, seed in (("ssm-a", 2), ("ssm-b", 3)) if name in sources
    ]
    lookups: list[DraftSource] = []
    if "prompt-lookup" in sources:
        lookups.append(PromptLookup(0.02))
    if "suffix-index" in sources:
        lookups.append(OutputLookup(0.02, 10_000))
    metrics = SpeculatorMetrics(CollectorRegistry())
    return DraftService(models, lookups, vocab_size, metrics), models


def opening(sequence: int, tokens: list[int], seed: int = 0, **draft: Any) -> SpeculateRequest:
    opened = OpenSequence(sequence, tokens, SamplingParams(seed=seed), prompt_length=len(tokens))
    return SpeculateRequest(1, open=[opened], draft=[wish(sequence, **draft)])


def advancing(sequence: int, tokens: Sequence[int], **draft: Any) -> SpeculateRequest:
    return SpeculateRequest(2, advance=[AdvanceSequence(sequence, tokens)], draft=[wish(sequence, **draft)])


def wish(sequence: int, **draft: Any) -> DraftRequest:
    return DraftRequest(sequence, **({"max_nodes": 6, "max_depth": 3} | draft))


def trees_of(response: SpeculateResponse) -> Sequence[TokenTree]:
    (trees,) = response.drafts.values()
    return trees


def speak(service: DraftService, sequence: int, output: list[int]) -> None:
    service.answer(9, opening(sequence, PROMPT))
    service.answer(9, advancing(sequence, output))
    service.answer(9, SpeculateRequest(close=[sequence]))


def test_a_sequence_that_ends_leaves_its_last_tokens_to_the_index() -> None:
    """They come in the message that closes it, together with another sequence's order."""
    service, _ = build(("suffix-index",))
    service.answer(9, opening(1, PROMPT))
    message = opening(2, [3, 3, 0])
    message.advance, message.close = [AdvanceSequence(1, [3, 3, 0, 1, 2])], [1]
    (tree,) = trees_of(service.answer(9, message))
    assert list(tree.token_ids[:3]) == [0, 1, 2]
    assert service.answer(9, advancing(1, [0])).unknown_sequence_ids == [1]


ALL = ("ssm-a", "ssm-b", "prompt-lookup", "suffix-index")
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(ALL, size)]


@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
def test_mss_has_the_models_distribution_with_every_combination(sources: tuple[str, ...]) -> None:
    """Cut as well. Look-up has seen other outputs; the sampled ones leave nothing that a later one could find."""
    service, models = build(sources)
    for sequence, output in enumerate(([1, 2, 0, 3, 1, 0, 2], [1, 0, 3, 1, 2, 2, 0], [3, 3, 0, 1])):
        speak(service, sequence, output)
    max_nodes = 6 * max(1, len(models)) - 2
    contributed = dict.fromkeys(sources, 0)
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(200):
        tokens = list(PROMPT)
        message = opening(100, tokens, seed, selection=SAMPLED)
        while len(tokens) < len(PROMPT) + 2:
            trees = trees_of(service.answer(1, message))
            for tree in trees:
                contributed[tree.source] += len(tree) - 1
            root = MergedDraft.root_only(tokens[-1])
            draft = merge_trees(trees, max_nodes) if trees else root
            fresh = step(MSS, LLM, draft, seed, len(tokens)).token_ids
            tokens.extend(fresh)
            message = advancing(100, fresh, selection=SAMPLED)
        counts[tuple(tokens[len(PROMPT) : len(PROMPT) + 2])] += 1
    assert all(contributed.values()), contributed
    assert chi_square_p_value(counts, exact_joint(LLM, 2)) > ALPHA


@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
@pytest.mark.parametrize("nodes", [1, 2, 6, 9])
def test_sampled_trees_keep_their_budget_together(sources: tuple[str, ...], nodes: int) -> None:
    service, models = build(sources)
    speak(service, 1, [1, 2, 0, 3, 1, 0, 2])
    trees = trees_of(service.answer(1, opening(1, PROMPT, max_nodes=nodes, selection=SAMPLED)))
    assert all(len(tree) <= nodes + 1 for tree in trees)
    assert sum(len(tree) - 1 for tree in trees) <= nodes * max(1, len(models))
    if models and nodes > 1:
        looked_up = sum(len(tree) - 1 for tree in trees if not tree.distributions)
        assert looked_up <= nodes // 2
        assert (looked_up > 0) == (len(models) < len(sources))
    assert all(order.nodes >= 1 for model in models for order in model.orders)
    trees = trees_of(service.answer(1, opening(1, PROMPT, max_nodes=nodes)))
    assert [model.orders[0].nodes for model in models] == [nodes] * len(models), "others are cut after merging"


def test_sessions_of_all_sources_open_and_close_together() -> None:
    service, (model,) = build(("ssm-a", "prompt-lookup", "suffix-index"))
    service.answer(1, opening(1, PROMPT))
    service.answer(2, opening(1, PROMPT))
    assert list(model.sessions) == [(1, 1), (2, 1)]
    service.end(1)
    assert list(model.sessions) == [(2, 1)]
    lost = service.answer(1, advancing(1, [1]))
    assert (list(lost.unknown_sequence_ids), lost.drafts) == ([1], {})
    again = service.answer(1, opening(1, [*PROMPT, 1]))
    assert not again.unknown_sequence_ids
    assert trees_of(again)


def test_nothing_found_is_nothing_sent() -> None:
    service, _ = build(("prompt-lookup", "suffix-index"))
    assert service.answer(1, opening(4, [3])).drafts == {4: []}


def test_models_are_left_out_of_a_draft_by_look_up_alone() -> None:
    service, (model,) = build(("ssm-a", "prompt-lookup"))
    trees = trees_of(service.answer(1, opening(1, PROMPT, lookup_only=True)))
    assert [tree.source for tree in trees] == ["prompt-lookup"]
    assert model.orders == []
    both = trees_of(service.answer(1, advancing(1, [1], lookup_only=False)))
    assert [tree.source for tree in both] == ["ssm-a", "prompt-lookup"], "the model has not lost the sequence"
    assert model.sessions[1, 1][0] == [*PROMPT, 1]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_a_bound_that_is_no_probability(wrong: float) -> None:
    service, _ = build(("ssm-a",))
    with pytest.raises(InvalidMessage, match="min_confidence is"):
        service.answer(1, opening(1, PROMPT, min_confidence=wrong))


def test_without_a_model_any_token_may_be_the_verifiers() -> None:
    service, _ = build(("prompt-lookup",), None)
    service.answer(1, opening(1, [SEPARATOR - 1] * 4))
    for message in (opening(1, [SEPARATOR]), opening(1, []), advancing(1, []), advancing(1, [SEPARATOR])):
        with pytest.raises(InvalidMessage):
            service.answer(1, message)
    service, _ = build(("ssm-a", "prompt-lookup"))
    with pytest.raises(InvalidMessage, match="the vocabulary has 4"):
        service.answer(1, opening(1, [VOCAB]))


def test_the_look_ups_half_is_asked_for_before_the_models_draw() -> None:
    service, (model,) = build(("ssm-a", "prompt-lookup"))
    first = service.answer(1, opening(1, PROMPT, seed=1, selection=SAMPLED))
    second = service.answer(1, opening(1, PROMPT, seed=2, selection=SAMPLED))
    looked_up = [[tree for tree in trees_of(answer) if not tree.distributions] for answer in (first, second)]
    assert looked_up[0][0].token_ids == looked_up[1][0].token_ids, "whatever the seed"
    assert model.orders[0].selection is ChildSelection.SAMPLED
    assert model.orders[0].nodes == 6 - (len(looked_up[0][0]) - 1)
