"""One small model that drafts: sessions with their KV, and trees for all sequences at once.

Knows nothing of the network. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

import torch

from kernels.draft_loop.native import ChildRule
from runtime.batch import Segment
from runtime.kv_cache import CachedSequence, CacheFull, KVCache, slot
from runtime.step_graph import Capture
from runtime.transformer import Transformer
from services.speculator.graph_growth import GrowthGraphs
from services.speculator.level_growth import grow_by_level, root_logits
from services.speculator.native_growth import child_rule, grow_natively
from services.speculator.session import DrafterSettings, DraftOrder, Session, SessionKey
from speculation.logits import LogitsPipeline
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree

# More tokens of text than a step gives any sequence are a prompt, or an output that was computed once.
_GIVEN_BY_A_STEP = 32


class Drafter:
    """Drafts with one model."""

    def __init__(
        self,
        name: str,
        model: Transformer,
        cache: KVCache,
        settings: DrafterSettings,
        capture: Capture | None = None,
    ) -> None:
        """capture: of all levels of a draft in one; None: they are separate passes, or the native loop's."""
        self.name = name
        self.model = model
        self.cache = cache
        self.settings = settings
        self._graphs = None if capture is None else GrowthGraphs(model, cache, settings, capture)
        self._sessions: dict[SessionKey, Session] = {}  # least recently drafted first
        self._behind: dict[SessionKey, int] = {}  # in turn: so many tokens of each are computed ahead of its draft
        # Slots of accepted nodes and where their KV belongs. Nothing is written to the cache between drafts: the moves
        # of all sequences wait for the next one.
        self._sources: list[int] = []
        self._targets: list[int] = []

    def capture_drafts(self, sequences: int) -> int:
        """Capture what the usual drafts of up to `sequences` sequences compute, so that none waits for it; how many
        shapes that are, 0 where drafts are not captured.
        """
        if self._graphs is None:
            return 0
        return self.model.prepare_steps(sequences) + self._graphs.prepare(sequences)

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._sessions

    def open(self, key: SessionKey, tokens: Sequence[int], prompt_length: int, params: SamplingParams) -> None:
        """Start a session, in place of one of the same key. `work_ahead` computes its tokens but the last, whose
        distribution is the draft's own; what has no room waits for its draft.
        """
        self.close(key)
        prompt, output = tokens[:prompt_length], tokens[prompt_length:]
        pipeline = LogitsPipeline(params, prompt, self.model.config.vocab_size, self.model.device)
        pipeline.advance(output)
        self._sessions[key] = Session(list(tokens), pipeline)
        fits = len(tokens) <= self.model.config.context_length
        if fits and self._make_room(key, len(tokens), busy={key, *self._behind}):
            self._behind[key] = len(tokens) - 1

    def work_ahead(self) -> bool:
        """One forward pass of at most `prefill_chunk` tokens of text; whether there is more to compute."""
        chunks: list[tuple[CachedSequence, list[int]]] = []
        left = self.settings.prefill_chunk
        while self._behind and left > 0:
            key, wanted = next(iter(self._behind.items()))
            session = self._sessions[key]
            start = session.cache.length
            end = min(start + left, wanted)
            if end > start:
                chunks.append((session.cache, session.tokens[start:end]))
                left -= end - start
            if end < wanted:
                break
            del self._behind[key]
        if chunks:
            self._settle()
            self.model.step([Segment.chain(cache, tokens, cache.length) for cache, tokens in chunks], [], self.cache)
            if self.model.device.type == "cuda":  # what is only queued would hold the next draft up
                torch.cuda.synchronize(self.model.device)
        for cache, tokens in chunks:
            cache.length += len(tokens)
        return bool(self._behind)

    def advance(self, key: SessionKey, token_ids: Sequence[int]) -> None:
        """Append accepted tokens; the KV of those that the last tree had evaluated is kept."""
        session = self._sessions[key]
        if session.slots is not None:
            # At least the last token stays uncomputed: it is the next root, whose distribution is wanted.
            self._keep(session, session.slots.match(token_ids)[: len(token_ids)])
        session.tokens.extend(token_ids)
        session.pipeline.advance(token_ids)

    def close(self, key: SessionKey) -> None:
        if (session := self._sessions.pop(key, None)) is not None:
            self._behind.pop(key, None)
            self.cache.release(session.cache)

    def close_stream(self, stream: int) -> None:
        """End every session of a stream."""
        for key in [key for key in self._sessions if key[0] == stream]:
            self.close(key)

    def draft(self, orders: Iterable[DraftOrder]) -> dict[SessionKey, TokenTree]:
        """A tree for every order whose sequence fits the model's context and cache; the others are left out. So are
        those with more text to compute than the rest may wait for, until `work_ahead` has done it.
        """
        self._settle()
        growing = [(self._sessions[order.key], order) for order in orders]
        busy = {order.key for _, order in growing}
        growing = [(session, order) for session, order in growing if self._has_room(session, order, busy)]
        ruled, by_level = self._split(self._caught_up(growing))
        trees = [
            *(self._grow_in_one(ruled) if ruled else ()),
            *(grow_by_level(self.name, self.model, self.cache, self.settings, by_level) if by_level else ()),
        ]
        keys = [*(order.key for _, order, _ in ruled), *(order.key for _, order in by_level)]
        return dict(zip(keys, trees, strict=True))

    def _grow_in_one(self, growing: Sequence[tuple[Session, DraftOrder, ChildRule]]) -> list[TokenTree]:
        """All levels in one native call, or in one graph."""
        if self._graphs is None:
            return grow_natively(self.name, self.model, self.cache, self.settings, growing)
        trees: list[TokenTree] = []
        for part in self._graphs.parts(growing):
            logits = root_logits(self.model, self.cache, [session for session, _, _ in part])
            trees += self._graphs.grow(self.name, part, logits)
        return trees

    def _make_room(self, key: SessionKey, entries: int, busy: Set[SessionKey]) -> bool:
        """Reserve so much KV for a session, if need be that of the sessions that have not drafted for the longest time.

        busy: those that compute something now; they keep theirs.
        """
        session = self._sessions[key] = self._sessions.pop(key)
        session.slots = None
        while True:
            try:
                self.cache.reserve(session.cache, entries)
            except CacheFull:
                others = (other for other, held in self._sessions.items() if held.cache.blocks and other not in busy)
                if (victim := next(others, None)) is None:
                    return False
                self._evict(victim)
            else:
                return True

    def _evict(self, key: SessionKey) -> None:
        session = self._sessions[key]
        self.cache.release(session.cache)
        self._behind.pop(key, None)
        session.slots = None

    def _has_room(self, session: Session, order: DraftOrder, busy: Set[SessionKey]) -> bool:
        """Whether the draft fits the model's context and the cache, where its entries are then reserved."""
        if len(session.tokens) + order.depth > self.model.config.context_length:
            return False
        entries = len(session.tokens) + self.settings.beam * order.depth + order.nodes
        return self._make_room(order.key, entries, busy)

    def _caught_up(self, growing: list[tuple[Session, DraftOrder]]) -> list[tuple[Session, DraftOrder]]:
        """Those whose drafts compute at most `prefill_chunk` tokens of text together, shortest first, and those behind
        by what a step gives; the text of the others is to be computed ahead.
        """
        left = self.settings.prefill_chunk
        waiting: set[SessionKey] = set()
        for session, order in sorted(growing, key=lambda entry: entry[0].uncomputed):
            if session.uncomputed > _GIVEN_BY_A_STEP:
                left -= session.uncomputed
            if left < 0:
                waiting.add(order.key)
                self._behind[order.key] = len(session.tokens) - 1
        return [(session, order) for session, order in growing if order.key not in waiting] if waiting else growing

    def _settle(self) -> None:
        """Move the KV that accepted tokens keep; before anything is written to the cache."""
        self.model.compact(self.cache, self._sources, self._targets)
        self._sources, self._targets = [], []

    def _split(
        self, growing: Sequence[tuple[Session, DraftOrder]]
    ) -> tuple[list[tuple[Session, DraftOrder, ChildRule]], list[tuple[Session, DraftOrder]]]:
        """What can be grown in one go, with its rules, and what cannot."""
        ruled: list[tuple[Session, DraftOrder, ChildRule]] = []
        by_level: list[tuple[Session, DraftOrder]] = []
        for session, order in growing:
            rule = child_rule(session.pipeline.params, order.selection, self.settings.calibration)
            if rule is not None and (
                self.model.grows_trees if self._graphs is None else self._graphs.takes(order, rule)
            ):
                ruled.append((session, order, rule))
            else:
                by_level.append((session, order))
        return ruled, by_level

    def _keep(self, session: Session, slots: Sequence[int]) -> None:
        """Move the KV of accepted nodes right behind the committed entries; `slots` count from there, in path order."""
        start = session.cache.length
        for target, source in enumerate(slots):
            if source != target:
                self._sources.append(slot(session.cache, start + source))
                self._targets.append(slot(session.cache, start + target))
        session.cache.length = start + len(slots)
        session.slots = None
