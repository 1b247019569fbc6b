"""Which sequences take part in the next step: admission, chunked prefill, KV blocks, preemption.

Knows nothing of trees' contents or of the network. Only the engine's thread calls it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from runtime.kv_cache import CacheFull, KVCache
from services.verifier.sequence import Sequence

MIN_DRAFT_NODES = 3


@dataclass(frozen=True)
class SchedulerSettings:
    """Bounds of a step and of the queue.

    max_sequences: sequences in one step. max_step_rows: rows of one forward pass, trees and prompt chunks together.
    prefill_chunk: prompt tokens of one sequence in one step.
    draft_nodes, draft_depth: bounds of a tree, the root not counted.
    max_draft_rows: draft nodes of all trees of a step; the sequences share them evenly. A share of fewer nodes than
        both MIN_DRAFT_NODES and draft_nodes is none: it would not earn its round trip.
    """

    max_sequences: int
    max_step_rows: int
    prefill_chunk: int
    draft_nodes: int
    draft_depth: int
    max_draft_rows: int


@dataclass(frozen=True)
class SequencePlan:
    """One sequence's part in a step: a chunk of tokens[cache.length:chunk_end] and, if that reaches the root, a tree.

    draft_nodes, draft_depth: budget of its draft; 0 is plain decoding.
    """

    sequence: Sequence
    chunk_end: int
    decodes: bool
    draft_nodes: int
    draft_depth: int


class Scheduler:
    """Holds the waiting and the running sequences; plans steps in the order of arrival."""

    def __init__(self, settings: SchedulerSettings, cache: KVCache, context_length: int) -> None:
        self.settings = settings
        self.cache = cache
        self.context_length = context_length
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._preemptions = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def take_preemptions(self) -> int:
        """How many sequences had to give their KV back since the last call."""
        count, self._preemptions = self._preemptions, 0
        return count

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its KV."""
        self.cache.release(sequence.cache)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> list[SequencePlan]:
        """Plan one step: running sequences first, oldest first, then new ones while rows and KV blocks last.

        Reserves the KV blocks of every planned row. When blocks run out, the youngest running sequence gives its own
        back and waits, to be computed again; the oldest can always go on, because the cache holds one full context.
        """
        plans: list[SequencePlan] = []
        rows = self.settings.max_step_rows
        for sequence in list(self.running):
            if sequence not in self.running or rows == 0:
                continue  # preempted by an older one, or no row is left
            plan = self._plan_sequence(sequence, rows)
            if self._reserve(plan, may_preempt=True):
                plans.append(plan)
                rows -= _rows_of(plan)
        while self.waiting and rows > 0 and len(self.running) < self.settings.max_sequences:
            plan = self._plan_sequence(self.waiting[0], rows)
            if not self._has_room(plan.sequence) or not self._reserve(plan, may_preempt=False):
                break
            self.running.append(self.waiting.popleft())
            plans.append(plan)
            rows -= _rows_of(plan)
        return plans

    def _plan_sequence(self, sequence: Sequence, rows: int) -> SequencePlan:
        chunk = min(sequence.uncomputed, self.settings.prefill_chunk, rows)
        chunk_end = sequence.cache.length + chunk
        rows -= chunk
        decodes = chunk == sequence.uncomputed and rows > 0
        if not decodes:
            return SequencePlan(sequence, chunk_end, False, 0, 0)
        # A tree of depth d gives at most d + 1 tokens, and its deepest node stands at position len(tokens) - 1 + d.
        depth = min(self.settings.draft_depth, sequence.remaining - 1, self.context_length - len(sequence.tokens))
        nodes = min(self.settings.draft_nodes, self._draft_share(), rows - 1)
        if depth <= 0 or nodes <= 0 or not sequence.request.speculative:
            return SequencePlan(sequence, chunk_end, True, 0, 0)
        return SequencePlan(sequence, chunk_end, True, nodes, depth)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether all its tokens and a tree fit, and each running sequence can grow by a block meanwhile.

        Without that room a sequence would be admitted, computed, and have to give way a few steps later.
        """
        entries = len(sequence.tokens) + self.settings.draft_nodes
        needed = self.cache.blocks_needed(sequence.cache, entries) + len(self.running)
        return not self.running or needed <= self.cache.free_blocks

    def _draft_share(self) -> int:
        sequences = min(len(self.running) + len(self.waiting), self.settings.max_sequences)
        share = self.settings.max_draft_rows // max(1, sequences)
        return share if share >= min(MIN_DRAFT_NODES, self.settings.draft_nodes) else 0

    def _reserve(self, plan: SequencePlan, may_preempt: bool) -> bool:
        """Reserve the plan's KV blocks; False when the sequence itself had to give way."""
        entries = plan.chunk_end + (1 + plan.draft_nodes if plan.decodes else 0)
        while True:
            try:
                self.cache.reserve(plan.sequence.cache, entries)
            except CacheFull:
                if not may_preempt:
                    return False
                victim = self.running[-1]
                self._preempt(victim)
                if victim is plan.sequence:
                    return False
            else:
                return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.release(sequence.cache)
        self.waiting.appendleft(sequence)
        self._preemptions += 1


def _rows_of(plan: SequencePlan) -> int:
    tree = 1 + plan.draft_nodes if plan.decodes else 0
    return plan.chunk_end - plan.sequence.cache.length + tree
