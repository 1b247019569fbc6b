"""Which sequences take part in the next step: admission, chunked prefill, KV blocks, preemption.

Knows nothing of trees' contents or of the network. Only the engine's thread calls it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from runtime.kv_cache import BLOCK_SIZE, CacheFull, KVCache
from services.verifier.sequence import Sequence


@dataclass(frozen=True)
class SchedulerSettings:
    """Bounds of a step and of the queue.

    max_sequences: sequences in one step. max_step_rows: rows of one forward pass, trees and prompt chunks together.
    prefill_chunk: prompt tokens of one sequence in one step.
    draft_nodes, draft_depth: bounds of a tree, the root not counted.
    """

    max_sequences: int
    max_step_rows: int
    prefill_chunk: int
    draft_nodes: int
    draft_depth: int


@dataclass(frozen=True)
class SequencePlan:
    """One sequence's part in a step: a chunk of tokens[cache.length:chunk_end] and, if that reaches the root, a tree.

    draft_nodes, draft_depth: upper bounds of its draft; 0 is plain decoding.
    """

    sequence: Sequence
    chunk_end: int
    decodes: bool
    draft_nodes: int
    draft_depth: int

    @property
    def computes_prompt(self) -> bool:
        return self.chunk_end > self.sequence.cache.length


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

    def plan(self, *, drafts: bool = True) -> list[SequencePlan]:
        """Plan one step: running sequences first, oldest first, then new ones while rows and KV blocks last.

        Reserves the KV blocks of every planned row. When blocks run out, the youngest running sequence gives its own
        back and waits, to be computed again; the oldest can always go on, because the cache holds one full context.
        Drafts, if there are to be any, have what is left: none makes a sequence wait.
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
        return self._with_drafts(plans, rows) if drafts else plans

    def _plan_sequence(self, sequence: Sequence, rows: int) -> SequencePlan:
        chunk = min(sequence.uncomputed, self.settings.prefill_chunk, rows)
        decodes = chunk == sequence.uncomputed and rows > chunk
        return SequencePlan(sequence, sequence.cache.length + chunk, decodes, 0, 0)

    def _with_drafts(self, plans: list[SequencePlan], rows: int) -> list[SequencePlan]:
        """The plans with the bounds of their drafts, which share the rows and the KV blocks that are left."""
        depths = [self._draft_depth(plan) for plan in plans]
        share = min(self.settings.draft_nodes, rows // max(1, sum(depth > 0 for depth in depths)))
        if share == 0:
            return plans
        return [
            replace(plan, draft_nodes=nodes, draft_depth=depth)
            if depth > 0 and (nodes := self._reserve_draft(plan, share)) > 0
            else plan
            for plan, depth in zip(plans, depths, strict=True)
        ]

    def _draft_depth(self, plan: SequencePlan) -> int:
        """A tree of depth d gives at most d + 1 tokens, and its deepest node stands at position len(tokens) - 1 + d."""
        sequence = plan.sequence
        if not plan.decodes or not sequence.request.speculative:
            return 0
        return min(self.settings.draft_depth, sequence.remaining - 1, self.context_length - len(sequence.tokens))

    def _reserve_draft(self, plan: SequencePlan, nodes: int) -> int:
        """How many of the nodes got a place in the cache."""
        cache = plan.sequence.cache
        free = len(cache.blocks) * BLOCK_SIZE - plan.chunk_end - 1
        nodes = min(nodes, free + self.cache.free_blocks * BLOCK_SIZE)
        self.cache.reserve(cache, plan.chunk_end + 1 + nodes)
        return nodes

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether all its tokens fit, and each running sequence can grow by a block meanwhile.

        Without that room a sequence would be admitted, computed, and have to give way a few steps later.
        """
        needed = self.cache.blocks_needed(sequence.cache, len(sequence.tokens)) + len(self.running)
        return not self.running or needed <= self.cache.free_blocks

    def _reserve(self, plan: SequencePlan, may_preempt: bool) -> bool:
        """Reserve the plan's KV blocks; False when the sequence itself had to give way."""
        entries = plan.chunk_end + plan.decodes
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
    """Rows without a draft."""
    return plan.chunk_end - plan.sequence.cache.length + plan.decodes
