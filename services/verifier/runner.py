"""One forward pass for a step's prompt chunks and trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.batch import Segment
from runtime.kv_cache import KVCache, slot
from runtime.step_model import StepModel
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from speculation.merge import MergedDraft


@dataclass(frozen=True)
class StepLogits:
    """Logits of one step.

    rows: rows of the forward pass; chunk_rows: those of prompt chunks.
    trees: float32 [nodes of all trees, vocab]; the nodes of sequence i start at tree_starts[i].
    chunks: float32 [chunk rows, vocab] by sequence id, only where prompt log-probabilities are wanted.
    argmax: the first most likely token of each row, trees' first; None where the step did not find it.
    """

    rows: int
    chunk_rows: int
    trees: torch.Tensor
    tree_starts: Mapping[int, int]
    chunks: Mapping[int, torch.Tensor]
    argmax: list[int] | None = None


class Runner:
    """Owns the model and its cache; only the engine's thread calls it."""

    def __init__(self, model: StepModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    @property
    def asynchronous(self) -> bool:
        """Whether a device goes on computing when `forward` has returned."""
        return self.model.device.type != "cpu"

    def device_works(self) -> bool:
        """Whether the device still computes: an error of some kinds fails every later call."""
        try:
            return torch.ones(1, device=self.model.device).item() == 1
        except RuntimeError:
            return False

    def forward(self, plans: Sequence[SequencePlan], drafts: Mapping[int, MergedDraft]) -> StepLogits:
        """Compute the planned chunks and trees; afterwards the KV of the chunks is committed.

        A tree may stand right behind a chunk of its own sequence: every row's key and value are written before any row
        attends, layer by layer.
        """
        segments: list[Segment] = []
        wanted: list[int] = []  # rows of all trees, then those of chunks
        tree_starts: dict[int, int] = {}
        spans: dict[int, range] = {}
        rows = 0
        for plan in plans:
            sequence = plan.sequence
            if plan.chunk_end > sequence.cache.length:
                segments.append(_chunk(plan))
                span = range(rows, rows := rows + len(segments[-1].token_ids))
                if not sequence.prompt_logprobs_sent:
                    spans[sequence.id] = span
            if plan.decodes:
                segments.append(_tree(plan, drafts[sequence.id]))
                tree_starts[sequence.id] = len(wanted)
                wanted += range(rows, rows := rows + len(segments[-1].token_ids))
        in_trees = len(wanted)
        for span in spans.values():
            wanted += span
        logits = self.model.step(segments, wanted, self.cache)
        for plan in plans:
            plan.sequence.cache.length = plan.chunk_end
        chunks: dict[int, torch.Tensor] = {}
        if spans:
            logits, *parts = logits.split([in_trees, *map(len, spans.values())])
            chunks = dict(zip(spans, parts, strict=True))
        return StepLogits(rows, rows - in_trees, logits, tree_starts, chunks, self.model.argmax)

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
    """Of the prompt; and of the output, where it is computed once more: the prompt's last token was the first root."""
    sequence, start = plan.sequence, plan.sequence.cache.length
    tokens = sequence.tokens[start : plan.chunk_end]
    return Segment.chain(sequence.cache, tokens, start, decoded_from=len(sequence.request.prompt) - 1)


def _tree(plan: SequencePlan, draft: MergedDraft) -> Segment:
    tree = draft.tree
    return Segment.tree(plan.sequence.cache, tree.token_ids, tree.depths(), tree.ancestor_masks(), plan.chunk_end)
