"""Trees of one small model, level by level: one forward pass for each level of all sequences, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from runtime.batch import Segment
from runtime.kv_cache import KVCache
from runtime.transformer import Transformer
from services.speculator.session import DrafterSettings, DraftOrder, Session
from speculation.expansion import BestFirstExpansion, ChildPolicy, Expansion, StaticExpansion
from speculation.tree import TokenTree


@dataclass(eq=False)
class _Growth:
    session: Session
    expansion: Expansion


def grow_by_level(
    name: str,
    model: Transformer,
    cache: KVCache,
    settings: DrafterSettings,
    growing: Sequence[tuple[Session, DraftOrder]],
) -> list[TokenTree]:
    """The trees, in the order given; the sessions know afterwards what was evaluated.

    name: becomes the trees' source. Each session's uncomputed tokens go into one forward pass.
    """
    growths = [_Growth(session, _expansion(name, session, order, settings)) for session, order in growing]
    level = [growth for growth in growths if growth.expansion.frontier()]
    log_probs: list[torch.Tensor] = []
    if level:
        logits = root_logits(model, cache, [growth.session for growth in level])
        log_probs = _log_probs(level, logits, [1] * len(level))
    while level:
        level = _extend(level, log_probs)
        log_probs = _frontiers(model, cache, level)
    for growth in growths:
        growth.session.slots = growth.expansion.slots()
    return [growth.expansion.build() for growth in growths]


def _expansion(name: str, session: Session, order: DraftOrder, settings: DrafterSettings) -> Expansion:
    root, position = session.tokens[-1], len(session.tokens)
    policy = ChildPolicy.calibrated(order.selection, session.pipeline.params, settings.stream, settings.calibration)
    if order.widths:
        widths = order.widths[: order.depth]
        return StaticExpansion(root, position, policy, widths=widths, max_nodes=order.nodes, source=name)
    return BestFirstExpansion(
        root,
        position,
        policy,
        max_nodes=order.nodes,
        max_depth=order.depth,
        beam=settings.beam,
        min_confidence=max(settings.min_confidence, order.min_confidence),
        source=name,
    )


def _frontiers(model: Transformer, cache: KVCache, level: Sequence[_Growth]) -> list[torch.Tensor]:
    """Log-probabilities behind each tree's frontier, [frontier, vocab] each."""
    if not level:
        return []
    segments = [_frontier_segment(growth) for growth in level]
    counts = [len(segment.token_ids) for segment in segments]
    return _log_probs(level, model.step(segments, range(sum(counts)), cache), counts)


def _log_probs(level: Sequence[_Growth], logits: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    return [
        growth.session.pipeline.draft_log_probs(rows, _frontier_paths(growth))
        for growth, rows in zip(level, logits.split(counts), strict=True)
    ]


def _extend(level: Sequence[_Growth], log_probs: list[torch.Tensor]) -> list[_Growth]:
    """Grow the trees by one level; those that want another.

    The children of all trees come back from the device in one copy.
    """
    ranked = [growth.expansion.rank(rows) for growth, rows in zip(level, log_probs, strict=True)]
    numbers = torch.cat([ranking.flatten() for ranking in ranked]).cpu().split([r.numel() for r in ranked])
    for growth, rows, flat, ranking in zip(level, log_probs, numbers, ranked, strict=True):
        growth.expansion.extend(rows, flat.view(ranking.shape))
    return [growth for growth in level if growth.expansion.frontier()]


def root_logits(model: Transformer, cache: KVCache, sessions: Sequence[Session]) -> torch.Tensor:
    """Compute the tokens that are not in the cache yet, the roots last; logits behind those, float32 [sessions, vocab].

    The next step may overwrite them.
    """
    segments = [_uncomputed_segment(session) for session in sessions]
    last = [end - 1 for end in accumulate(len(segment.token_ids) for segment in segments)]
    logits = model.step(segments, last, cache)
    for session in sessions:
        session.cache.length = len(session.tokens) - 1  # the root's entry is the first of the tree's
    return logits


def _uncomputed_segment(session: Session) -> Segment:
    start = session.cache.length
    return Segment.chain(session.cache, session.tokens[start:], start)


def _frontier_segment(growth: _Growth) -> Segment:
    expansion, cached = growth.expansion, growth.session.cache
    frontier = expansion.frontier()
    return Segment.tree(
        cached,
        [expansion.token_ids[node] for node in frontier],
        [expansion.depth(node) for node in frontier],
        expansion.frontier_masks(),
        start=cached.length,
        written=len(expansion.evaluated),
    )


def _frontier_paths(growth: _Growth) -> list[tuple[int, ...]] | None:
    if not growth.session.pipeline.params.needs_context:
        return None
    return [growth.expansion.path_tokens(node) for node in growth.expansion.frontier()]
