"""Answers what verifiers say with the trees of all draft sources. Knows no calls."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from services.common.drafting import AdvanceSequence, OpenSequence, SpeculateRequest, SpeculateResponse
from services.speculator.checks import check_tokens, draft_order
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.session import DraftOrder, SessionKey
from services.speculator.sources import DraftSource
from speculation.children import ChildSelection
from speculation.tree import TokenTree


class DraftService:
    """Answers one message after the other with all draft sources; one thread calls it.

    lookups: sources whose trees do not depend on the noise that sampled children are drawn with.
    vocab_size: of the models, None when there is none.
    """

    def __init__(
        self,
        models: Sequence[DraftSource],
        lookups: Sequence[DraftSource],
        vocab_size: int | None,
        metrics: SpeculatorMetrics,
    ) -> None:
        self._models = models
        self._lookups = lookups
        self._sources = [*models, *lookups]
        self._vocab_size = vocab_size
        self._metrics = metrics

    def answer(self, stream: int, message: SpeculateRequest, *, at_once: bool = False) -> SpeculateResponse:
        """Apply a message in the order of its fields; InvalidMessage or ValueError when it breaks the protocol.

        at_once: what `work_ahead` would compute is computed before the drafts, however long that takes.
        """
        started = time.perf_counter()
        response = self._answer(stream, message, at_once=at_once)
        response.work_seconds = time.perf_counter() - started
        self._metrics.answer_seconds.observe(response.work_seconds)
        return response

    def work_ahead(self) -> bool:
        """Compute a piece of the texts that drafts wait for, between two messages; whether there is more."""
        return any(source.work_ahead() for source in self._sources)

    def end(self, stream: int) -> None:
        """Forget everything that a stream has opened."""
        for source in self._sources:
            source.close_stream(stream)

    def _answer(self, stream: int, message: SpeculateRequest, *, at_once: bool) -> SpeculateResponse:
        unknown = {advance.sequence_id for advance in message.advance if not self._advance(stream, advance)}
        for sequence_id in message.close:
            for source in self._sources:
                source.close((stream, sequence_id))
        for opened in message.open:
            self._open(stream, opened)
        while at_once and self.work_ahead():
            pass
        orders = [draft_order(stream, wish) for wish in message.draft]
        unknown |= {order.key[1] for order in orders if order.key not in self._sources[0]}
        known = [order for order in orders if order.key[1] not in unknown]
        found = self._draft(known)
        drafts = {
            order.key[1]: [trees[order.key] for trees in found if order.key in trees and len(trees[order.key]) > 1]
            for order in known
        }
        self._metrics.draft_tokens.inc(sum([len(tree) - 1 for trees in drafts.values() for tree in trees]))
        return SpeculateResponse(message.step, drafts, sorted(unknown))

    def _open(self, stream: int, opened: OpenSequence) -> None:
        check_tokens("open.token_ids", opened.token_ids, self._vocab_size)
        for source in self._sources:
            source.open((stream, opened.sequence_id), opened.token_ids, opened.prompt_length, opened.sampling)

    def _advance(self, stream: int, advance: AdvanceSequence) -> bool:
        key = (stream, advance.sequence_id)
        if key not in self._sources[0]:
            return False
        check_tokens("advance.token_ids", advance.token_ids, self._vocab_size)
        for source in self._sources:
            source.advance(key, advance.token_ids)
        return True

    def _draft(self, orders: Sequence[DraftOrder]) -> list[Mapping[SessionKey, TokenTree]]:
        """The trees of each source.

        Sampled trees together must keep their budget, since merged ones can be cut by whole levels only. Of it, the
        look-ups may take half, and the models share the rest: it is fixed before anything is drawn.
        """
        left = {order.key: order.nodes for order in orders if order.selection is ChildSelection.SAMPLED}
        taken = dict.fromkeys(left, 0)
        if self._models:
            left = {key: nodes // 2 for key, nodes in left.items()}
        found: list[Mapping[SessionKey, TokenTree]] = []
        for waiting, source in zip(range(len(self._lookups), 0, -1), self._lookups, strict=True):
            shares = {key: nodes // waiting for key, nodes in left.items()}
            trees = source.draft(_with_nodes(orders, shares))
            for key in left:
                taken[key] += len(trees[key]) - 1
                left[key] -= len(trees[key]) - 1
            found.append(trees)
        shares = {key: math.ceil(nodes / max(1, len(self._models))) for key, nodes in taken.items()}
        rest = {order.key: order.nodes - shares[order.key] for order in orders if order.key in shares}
        orders = [order for order in _with_nodes(orders, rest) if not order.lookup_only]
        return [*(model.draft(orders) for model in self._models), *found] if orders else found


def _with_nodes(orders: Sequence[DraftOrder], nodes: Mapping[SessionKey, int]) -> Sequence[DraftOrder]:
    """The orders, some of them with other numbers of nodes."""
    return [order._replace(nodes=nodes[order.key]) if order.key in nodes else order for order in orders]
