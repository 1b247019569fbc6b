"""One small model that drafts: sessions with their KV, and trees grown level by level for all sequences at once.

Knows nothing of the network. Not thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from kernels.draft_loop.native import TreeBounds
from runtime.batch import Segment
from runtime.kv_cache import CachedSequence, CacheFull, KVCache, slot
from runtime.transformer import Transformer
from speculation.calibration import Calibration
from speculation.expansion import BestFirstExpansion, ChildPolicy, ChildSelection, StaticExpansion
from speculation.logits import LogitsPipeline
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree

Expansion = StaticExpansion | BestFirstExpansion


SessionKey = tuple[int, int]
"""(stream, sequence id): sequence ids belong to a stream."""


@dataclass(frozen=True)
class DraftOrder:
    """What tree is wanted; see DraftRequest in speculator.proto."""

    key: SessionKey
    nodes: int
    depth: int
    widths: tuple[int, ...]
    selection: ChildSelection
    min_confidence: float = 0.0
    lookup_only: bool = False


@dataclass(eq=False)
class Session:
    """A sequence as one small model knows it.

    tokens: all committed tokens; the last is the root of the next tree. cache: KV of tokens[:cache.length].
    expansion: the tree of the last draft, whose evaluated nodes stand behind cache.length.
    """

    tokens: list[int]
    pipeline: LogitsPipeline
    cache: CachedSequence = field(default_factory=CachedSequence)
    expansion: Expansion | None = None


@dataclass(frozen=True)
class DrafterSettings:
    """beam, min_confidence: of best-first growth. stream: tells the random draws of different models apart.

    calibration: of the model, against the LLM it drafts for.
    """

    prefill_chunk: int
    beam: int
    min_confidence: float
    stream: int
    calibration: Calibration


class Drafter:
    """Drafts with one model."""

    def __init__(self, name: str, model: Transformer, cache: KVCache, settings: DrafterSettings) -> None:
        self.name = name
        self.model = model
        self.cache = cache
        self.settings = settings
        self._sessions: dict[SessionKey, Session] = {}  # least recently drafted first

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._sessions

    def open(self, key: SessionKey, tokens: Sequence[int], prompt_length: int, params: SamplingParams) -> None:
        """Start a session, in place of one of the same key."""
        self.close(key)
        prompt, output = tokens[:prompt_length], tokens[prompt_length:]
        pipeline = LogitsPipeline(params, prompt, self.model.config.vocab_size, self.model.device)
        pipeline.advance(output)
        self._sessions[key] = Session(list(tokens), pipeline)

    def advance(self, key: SessionKey, token_ids: Sequence[int]) -> None:
        """Append accepted tokens; the KV of those that the last tree had evaluated is kept."""
        session = self._sessions[key]
        if session.expansion is not None:
            # At least the last token stays uncomputed: it is the next root, whose distribution is wanted.
            self._keep(session, session.expansion.match(token_ids)[: len(token_ids)])
        session.tokens.extend(token_ids)
        session.pipeline.advance(token_ids)

    def close(self, key: SessionKey) -> None:
        if (session := self._sessions.pop(key, None)) is not None:
            self.cache.release(session.cache)

    def close_stream(self, stream: int) -> None:
        """End every session of a stream."""
        for key in [key for key in self._sessions if key[0] == stream]:
            self.close(key)

    def draft(self, orders: Iterable[DraftOrder]) -> dict[SessionKey, TokenTree]:
        """A tree for every order whose sequence fits the model's context and cache; the others are left out."""
        growing = [(self._sessions[order.key], order) for order in orders]
        growing = [(session, order) for session, order in growing if self._prepare(session, order, growing)]
        for session, order in growing:
            session.expansion = self._expansion(session, order)
            if self._grows_natively(session, order):
                self._grow_natively(session, order)
        level = [session for session, _ in growing if _growing(session).frontier()]
        log_probs = self._roots(level)
        while level:
            level = _extend(level, log_probs)
            log_probs = self._frontiers(level)
        return {order.key: _growing(session).build() for session, order in growing}

    def _prepare(self, session: Session, order: DraftOrder, growing: list[tuple[Session, DraftOrder]]) -> bool:
        """Reserve the KV of a draft, if need be that of the sessions that have not drafted for the longest time."""
        if len(session.tokens) + order.depth > self.model.config.context_length:
            return False
        self._sessions[order.key] = self._sessions.pop(order.key)
        session.expansion = None
        entries = len(session.tokens) + self.settings.beam * order.depth + order.nodes
        keep = {id(other) for other, _ in growing}
        victims = [other for other in self._sessions.values() if id(other) not in keep and other.cache.blocks]
        while True:
            try:
                self.cache.reserve(session.cache, entries)
            except CacheFull:
                if not victims:
                    return False
                victim = victims.pop(0)
                self.cache.release(victim.cache)
                victim.expansion = None
            else:
                return True

    def _grows_natively(self, session: Session, order: DraftOrder) -> bool:
        """Greedy drafts need nothing of Python between their levels; long prompts are computed chunk by chunk."""
        plain = session.pipeline.plain_argmax and order.selection is ChildSelection.TOP
        return plain and self.model.grows_trees and self._uncomputed(session) <= self.settings.prefill_chunk

    def _grow_natively(self, session: Session, order: DraftOrder) -> None:
        depth = min(order.depth, len(order.widths)) if order.widths else order.depth
        floor = 0.0 if order.widths else max(self.settings.min_confidence, order.min_confidence)
        bounds = TreeBounds(
            nodes=order.nodes,
            depth=depth,
            beam=self.settings.beam,
            floor=math.log(floor) if floor > 0 else -math.inf,
            widths=order.widths[:depth],
            temperature=self.settings.calibration.greedy_temperature,
        )
        grown = self.model.grow_tree(self.cache, session.cache, session.tokens[session.cache.length :], bounds)
        session.cache.length = len(session.tokens) - 1
        _growing(session).adopt(grown.token_ids, grown.parents, grown.confidences, grown.evaluated)

    def _expansion(self, session: Session, order: DraftOrder) -> Expansion:
        root, position = session.tokens[-1], len(session.tokens)
        params, settings = session.pipeline.params, self.settings
        policy = ChildPolicy.calibrated(order.selection, params, settings.stream, settings.calibration)
        if order.widths:
            widths = order.widths[: order.depth]
            return StaticExpansion(root, position, policy, widths=widths, max_nodes=order.nodes, source=self.name)
        return BestFirstExpansion(
            root,
            position,
            policy,
            max_nodes=order.nodes,
            max_depth=order.depth,
            beam=settings.beam,
            min_confidence=max(settings.min_confidence, order.min_confidence),
            source=self.name,
        )

    def _roots(self, sessions: list[Session]) -> list[torch.Tensor]:
        """Compute the tokens that are not in the cache yet; log-probabilities behind each root, [1, vocab] each."""
        behind = [session for session in sessions if self._uncomputed(session) > self.settings.prefill_chunk]
        while behind:
            self.model.step([self._chunk(session) for session in behind], [], self.cache)
            behind = [session for session in behind if self._uncomputed(session) > self.settings.prefill_chunk]
        if not sessions:
            return []
        segments = [self._chunk(session) for session in sessions]
        last = [end - 1 for end in accumulate(len(segment.token_ids) for segment in segments)]
        logits = self.model.step(segments, last, self.cache)
        for session in sessions:
            session.cache.length = len(session.tokens) - 1  # the root's entry is the first of the tree's
        return self._log_probs(sessions, logits, [1] * len(sessions))

    def _uncomputed(self, session: Session) -> int:
        return len(session.tokens) - session.cache.length

    def _chunk(self, session: Session) -> Segment:
        start = session.cache.length
        tokens = session.tokens[start : start + self.settings.prefill_chunk]
        session.cache.length += len(tokens)
        return Segment.chain(session.cache, tokens, start)

    def _frontiers(self, sessions: list[Session]) -> list[torch.Tensor]:
        """Log-probabilities behind each session's frontier, [frontier, vocab] each."""
        if not sessions:
            return []
        segments = [_frontier_segment(session) for session in sessions]
        counts = [len(segment.token_ids) for segment in segments]
        return self._log_probs(sessions, self.model.step(segments, range(sum(counts)), self.cache), counts)

    def _log_probs(self, sessions: list[Session], logits: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        return [
            session.pipeline.draft_log_probs(rows, _frontier_paths(session))
            for session, rows in zip(sessions, logits.split(counts), strict=True)
        ]

    def _keep(self, session: Session, slots: Sequence[int]) -> None:
        """Move the KV of accepted nodes right behind the committed entries; `slots` count from there, in path order."""
        start = session.cache.length
        moved = [(source, target) for target, source in enumerate(slots) if source != target]
        sources = [slot(session.cache, start + source) for source, _ in moved]
        targets = [slot(session.cache, start + target) for _, target in moved]
        self.model.compact(self.cache, sources, targets)
        session.cache.length = start + len(slots)
        session.expansion = None


def _extend(sessions: list[Session], log_probs: list[torch.Tensor]) -> list[Session]:
    """Grow the sessions' trees by one level; those that want another.

    The children of all sessions come back from the device in one copy.
    """
    ranked = [_growing(session).rank(rows) for session, rows in zip(sessions, log_probs, strict=True)]
    numbers = torch.cat([ranking.flatten() for ranking in ranked]).cpu().split([r.numel() for r in ranked])
    for session, rows, flat, ranking in zip(sessions, log_probs, numbers, ranked, strict=True):
        _growing(session).extend(rows, flat.view(ranking.shape))
    return [session for session in sessions if _growing(session).frontier()]


def _frontier_segment(session: Session) -> Segment:
    expansion = _growing(session)
    frontier = expansion.frontier()
    return Segment.tree(
        session.cache,
        [expansion.token_ids[node] for node in frontier],
        [expansion.depth(node) for node in frontier],
        expansion.frontier_masks(),
        start=session.cache.length,
        written=len(expansion.evaluated),
    )


def _frontier_paths(session: Session) -> list[tuple[int, ...]] | None:
    if not session.pipeline.params.needs_context:
        return None
    expansion = _growing(session)
    return [expansion.path_tokens(node) for node in expansion.frontier()]


def _growing(session: Session) -> Expansion:
    assert session.expansion is not None, "only sessions with a tree take part in a level"
    return session.expansion
