"""Runners for the verifier's engine that compute less than the whole trees, and change none of its decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from runtime.batch import Segment
from runtime.kv_cache import KVCache
from runtime.transformer import Transformer
from services.verifier.runner import Runner, StepLogits
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from speculation.acceptance import AcceptanceRule, accept, resolve_rule
from speculation.merge import MergedDraft

Tokens = tuple[int, ...]

# Larger than any difference of Gumbel noise, so that the named token is the choice under every rule.
CERTAIN = 1e6


class KnownTexts(Runner):
    """Stands in for the LLM where its output is known: gives the next token of the text all the probability.

    Greedy text, and sampled text under shared noise or naive sampling, does not depend on the drafts: it is decoded
    once, and every way to draft is measured along it.
    """

    def __init__(self, model: Transformer, cache: KVCache, texts: Sequence[Tokens]) -> None:
        """texts: outputs of the prompts, whose request ids are their places."""
        super().__init__(model, cache)
        self._texts = {str(index): text for index, text in enumerate(texts)}

    def forward(self, plans: Sequence[SequencePlan], drafts: Mapping[int, MergedDraft]) -> StepLogits:
        named: list[int] = []
        starts: dict[int, int] = {}
        for plan in plans:
            sequence = plan.sequence
            sequence.cache.length = plan.chunk_end
            if plan.decodes:
                starts[sequence.id] = len(named)
                left = self._texts[sequence.request.request_id][sequence.generated :]
                # Behind the end of the text anything goes: the engine drops it.
                named.extend(left[depth] if depth < len(left) else 0 for depth in drafts[sequence.id].tree.depths())
        scores = torch.zeros(len(named), self.model.config.vocab_size)
        scores[torch.arange(len(named)), torch.tensor(named)] = CERTAIN
        return StepLogits(len(named), 0, scores, starts, {})


class VisitedNodes(Runner):
    """Computes the nodes that acceptance visits, one level of all trees after the other, and no others.

    As many rows as the text has tokens, where whole trees take a row for every node. The other nodes' logits are zero;
    the engine, which decides by the same rule from the same rows, never looks at them.
    """

    def __init__(self, model: Transformer, cache: KVCache, sampling_rule: AcceptanceRule) -> None:
        super().__init__(model, cache)
        self._sampling_rule = sampling_rule

    def forward(self, plans: Sequence[SequencePlan], drafts: Mapping[int, MergedDraft]) -> StepLogits:
        visits = [_Visit(plan.sequence, drafts[plan.sequence.id]) for plan in plans if plan.decodes]
        segments = [_up_to_root(plan) for plan in plans]
        rows = self._last_rows(segments)
        for plan in plans:
            plan.sequence.cache.length = plan.chunk_end
        for visit, row in zip(visits, (r for r, plan in zip(rows, plans, strict=True) if plan.decodes), strict=True):
            visit.rows[0] = row
        waiting = [visit for visit in visits if visit.wants_row(self._sampling_rule)]
        while waiting:
            rows = self._last_rows([visit.segment() for visit in waiting])
            for visit, row in zip(waiting, rows, strict=True):
                visit.rows[visit.node] = row
            waiting = [visit for visit in waiting if visit.wants_row(self._sampling_rule)]
        return self._logits(visits)

    def keep(self, accepted: Sequence[tuple[RunningSequence, tuple[int, ...]]]) -> None:
        """The visited nodes stand in path order already."""
        for sequence, nodes in accepted:
            sequence.cache.length += 1 + len(nodes)
            self.cache.trim(sequence.cache)

    def _last_rows(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Logits of the last row of each segment, float32 [segments, vocab]."""
        ends = accumulate(len(segment.token_ids) for segment in segments)
        return self.model.step(segments, [end - 1 for end in ends], self.cache).clone()  # kept beyond the next step

    def _logits(self, visits: Sequence[_Visit]) -> StepLogits:
        starts: dict[int, int] = {}
        nodes = 0
        for visit in visits:
            starts[visit.sequence.id] = nodes
            nodes += len(visit.draft.tree)
        trees = torch.zeros(nodes, self.model.config.vocab_size, device=self.model.device)
        for visit in visits:
            for node, row in visit.rows.items():
                trees[starts[visit.sequence.id] + node] = row
        return StepLogits(nodes, 0, trees, starts, {})


class _RowWanted(Exception):
    """Acceptance has come to a node whose logits are not there."""


@dataclass
class _Visit:
    """One sequence's step. rows: logits by node. node, path: the node wanted next, and the tokens down to it."""

    sequence: RunningSequence
    draft: MergedDraft
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    node: int = 0
    path: Tokens = ()

    def wants_row(self, sampling_rule: AcceptanceRule) -> bool:
        """Accept as far as the rows go; whether another one is wanted, which `node` and `path` then name."""
        params = self.sequence.request.sampling
        rule = resolve_rule(sampling_rule, params)
        try:
            accept(rule, self.draft, self._log_probs, seed=params.seed, position=len(self.sequence.tokens))
        except _RowWanted:
            return True
        return False

    def _log_probs(self, node: int, path: Tokens) -> torch.Tensor:
        if node not in self.rows:
            self.node, self.path = node, path
            raise _RowWanted
        return self.sequence.pipeline.process(self.rows[node], path)

    def segment(self) -> Segment:
        """The wanted node, behind its ancestors, which were wanted before it."""
        return Segment.chain(self.sequence.cache, self.path[-1:], self.sequence.cache.length + len(self.path))


def _up_to_root(plan: SequencePlan) -> Segment:
    cache, tokens = plan.sequence.cache, plan.sequence.tokens
    return Segment.chain(cache, tokens[cache.length : plan.chunk_end + plan.decodes], cache.length)
