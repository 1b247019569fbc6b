"""One forward pass for a step's prompt chunks and trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.batch import FlatBatch, Segment
from runtime.kv_cache import KVCache, slot
from runtime.transformer import Transformer
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from speculation.merge import MergedDraft


@dataclass(frozen=True)
class StepLogits:
    """Logits of one step.

    rows: rows of the forward pass.
    trees: float32 [nodes of all trees, vocab]; the nodes of sequence i start at tree_starts[i].
    chunks: float32 [chunk rows, vocab] by sequence id, only where prompt log-probabilities are wanted.
    """

    rows: int
    trees: torch.Tensor
    tree_starts: Mapping[int, int]
    chunks: Mapping[int, torch.Tensor]


class Runner:
    """Owns the model and its cache; only the engine's thread calls it."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    def forward(self, plans: Sequence[SequencePlan], drafts: Mapping[int, MergedDraft]) -> StepLogits:
        """Compute the planned chunks and trees; afterwards the KV of the chunks is committed.

        A tree may stand right behind a chunk of its own sequence: every row's key and value are written before any row
        attends, layer by layer.
        """
        segments: list[Segment] = []
        tree_spans: list[tuple[int, range]] = []
        chunk_spans: list[tuple[int, range]] = []
        rows = 0
        for plan in plans:
            sequence = plan.sequence
            if plan.chunk_end > sequence.cache.length:
                segments.append(_chunk(plan))
                span = range(rows, rows := rows + len(segments[-1].token_ids))
                if not sequence.prompt_logprobs_sent:
                    chunk_spans.append((sequence.id, span))
            if plan.decodes:
                segments.append(_tree(plan, drafts[sequence.id]))
                tree_spans.append((sequence.id, range(rows, rows := rows + len(segments[-1].token_ids))))
        hidden = self.model.forward(FlatBatch.of(segments, self.model.device), self.cache)
        for plan in plans:
            plan.sequence.cache.length = plan.chunk_end
        trees, starts = self._head(hidden, tree_spans)
        chunks = {sequence_id: self._head(hidden, [(sequence_id, span)])[0] for sequence_id, span in chunk_spans}
        return StepLogits(rows, trees, starts, chunks)

    def _head(self, hidden: torch.Tensor, spans: list[tuple[int, range]]) -> tuple[torch.Tensor, dict[int, int]]:
        """Logits of the spans' rows, one behind the other, and where each span starts among them."""
        rows = [row for _, span in spans for row in span]
        starts: dict[int, int] = {}
        first = 0
        for sequence_id, span in spans:
            starts[sequence_id] = first
            first += len(span)
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]
        if not rows:
            return hidden.new_empty(0, self.model.config.vocab_size, dtype=torch.float32), starts
        return self.model.logits(hidden), starts

    def keep(self, accepted: Sequence[tuple[RunningSequence, tuple[int, ...]]]) -> None:
        """Commit the KV of roots and accepted nodes; free what else the trees wrote.

        accepted: sequences, whose cache still ends before the root, with the accepted nodes in path order.
        """
        sources: list[int] = []
        targets: list[int] = []
        for sequence, nodes in accepted:
            root = sequence.cache.length
            for depth, node in enumerate(nodes, start=1):
                if node != depth:
                    sources.append(slot(sequence.cache, root + node))
                    targets.append(slot(sequence.cache, root + depth))
            sequence.cache.length = root + 1 + len(nodes)
        self.model.compact(self.cache, sources, targets)
        for sequence, _ in accepted:
            self.cache.trim(sequence.cache)


def _chunk(plan: SequencePlan) -> Segment:
    start = plan.sequence.cache.length
    return Segment.chain(plan.sequence.cache, plan.sequence.tokens[start : plan.chunk_end], start)


def _tree(plan: SequencePlan, draft: MergedDraft) -> Segment:
    tree = draft.tree
    return Segment.tree(plan.sequence.cache, tree.token_ids, tree.depths(), tree.ancestor_masks(), plan.chunk_end)
