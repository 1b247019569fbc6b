"""Collects the draft trees of a step from all speculators and merges them.

Knows nothing of the network: a `DraftSource` is something that is asked and, in time or not at all, answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence
from speculation.acceptance import AcceptanceRule, resolve_rule
from speculation.expansion import ChildSelection
from speculation.merge import MergedDraft, merge_trees
from speculation.tree import TokenTree


@dataclass(frozen=True)
class DraftOrder:
    """One sequence's draft: at most `nodes` nodes below the root, at most `depth` deep.

    widths: children by depth for static expansion; empty for best-first growth.
    """

    sequence: Sequence
    nodes: int
    depth: int
    widths: tuple[int, ...]
    selection: ChildSelection


class DraftSource(Protocol):
    """A speculator as the engine sees it. Every method returns at once but `receive`; none raises."""

    @property
    def models(self) -> int:
        """How many trees it drafts for a sequence, look-up not counted beside models; 0 while it is down."""

    def send(self, step: int, orders: Items[DraftOrder]) -> bool:
        """Ask for drafts; False when the source is down."""

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
        """Valid trees by sequence id; what is late, missing or wrong is left out. `deadline` is monotonic time."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""

    def flush(self) -> None:
        """Pass the endings on, without waiting for the next step."""

    def close(self) -> None:
        """End the stream and the reconnecting."""


@dataclass(frozen=True)
class DraftSettings:
    """rule: acceptance rule of sampled requests. widths: static expansion, or empty for best-first.

    timeout_s: how long a step waits for all speculators together.
    """

    rule: AcceptanceRule
    widths: tuple[int, ...]
    timeout_s: float


class DraftCollector:
    """One round trip to every speculator for each step. Only the engine's thread calls it."""

    def __init__(self, sources: Items[DraftSource], settings: DraftSettings) -> None:
        self.sources = sources
        self.settings = settings
        self._step = 0

    def collect(self, plans: Iterable[SequencePlan]) -> dict[int, MergedDraft]:
        """A draft for every sequence that decodes, by sequence id; one node where nobody drafted in time."""
        decoding = [plan for plan in plans if plan.decodes]
        orders = [self._order(plan) for plan in decoding if plan.draft_nodes > 0]
        trees = self._ask(orders) if orders and self.sources else {}
        return {plan.sequence.id: _merge(plan, trees.get(plan.sequence.id, [])) for plan in decoding}

    def forget(self, sequence: Sequence) -> None:
        for source in self.sources:
            source.forget(sequence)

    def flush(self) -> None:
        for source in self.sources:
            source.flush()

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def _order(self, plan: SequencePlan) -> DraftOrder:
        selection = resolve_rule(self.settings.rule, plan.sequence.request.sampling).selection
        nodes = plan.draft_nodes
        if selection is ChildSelection.SAMPLED:
            # Merged sampled trees can be cut by whole levels only, so that each gets its share of the budget.
            nodes = max(1, nodes // max(1, sum(source.models for source in self.sources)))
        return DraftOrder(plan.sequence, nodes, plan.draft_depth, self.settings.widths, selection)

    def _ask(self, orders: list[DraftOrder]) -> dict[int, list[TokenTree]]:
        self._step += 1
        asked = [source for source in self.sources if source.send(self._step, orders)]
        deadline = time.monotonic() + self.settings.timeout_s
        trees: dict[int, list[TokenTree]] = {}
        for source in asked:
            for sequence_id, drafted in source.receive(self._step, deadline).items():
                trees.setdefault(sequence_id, []).extend(drafted)
        return trees


def _merge(plan: SequencePlan, trees: list[TokenTree]) -> MergedDraft:
    if not trees:
        return MergedDraft.single(TokenTree.root_only(plan.sequence.tokens[-1]))
    return merge_trees(trees, plan.draft_nodes)
