"""Collects the draft trees of a step from all speculators and merges them.

Knows nothing of the network: a `DraftSource` is something that is asked and, in time or not at all, answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

from services.verifier.budget import Ask, DraftBudget, Wish
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence
from speculation.acceptance import AcceptanceRule, resolve_rule
from speculation.expansion import ChildSelection
from speculation.merge import MergedDraft
from speculation.tree import TokenTree


@dataclass(frozen=True)
class DraftOrder:
    """One sequence's draft: at most `nodes` nodes below the root, at most `depth` deep.

    widths: children by depth for static expansion; empty for best-first growth.
    floor: small models need not go on below paths less probable than this. models: False for look-up alone.
    """

    sequence: Sequence
    nodes: int
    depth: int
    widths: tuple[int, ...]
    selection: ChildSelection
    floor: float = 0.0
    models: bool = True


class DraftSource(Protocol):
    """A speculator as the engine sees it. No method raises.

    Of one that drafts elsewhere, every method returns at once but `receive`.
    """

    @property
    def names(self) -> Items[str]:
        """Of its small models, once they are known."""

    @property
    def elsewhere(self) -> bool:
        """Whether it drafts while the engine does something else, or in this thread, when it is waited for."""

    @property
    def models(self) -> int:
        """How many trees it drafts for a sequence, look-up not counted beside models; 0 while it is down."""

    def open(self, sequences: Items[Sequence]) -> None:
        """These will want drafts soon: what their text costs the source can be computed now."""

    def send(self, step: int, orders: Items[DraftOrder]) -> bool:
        """Ask for drafts; False when the source is down."""

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
        """Valid trees by sequence id; what is late, missing or wrong is left out. `deadline` is monotonic time."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended; what asks next tells the source."""

    def flush(self) -> None:
        """Tell it at once."""


@dataclass(frozen=True)
class DraftSettings:
    """rule: acceptance rule of sampled requests. widths: static expansion, or empty for best-first.

    timeout_s: how long a step waits for all speculators together.
    """

    rule: AcceptanceRule
    widths: tuple[int, ...]
    timeout_s: float


@dataclass(frozen=True)
class Asked:
    """Drafts that are under way for a step. sources: those that were asked; deadline: of all, in monotonic time."""

    plans: Items[SequencePlan]
    wishes: Items[Wish]
    ask: Ask
    sources: Items[DraftSource]
    step: int
    deadline: float

    @property
    def elsewhere(self) -> bool:
        """Whether drafts are being made while the engine does something else."""
        return any(source.elsewhere for source in self.sources)


class DraftCollector:
    """One round trip to every speculator for each step that drafts. Only the engine's thread calls it.

    Between `ask` and `collect` the speculators draft, and the engine may do something else.
    """

    def __init__(self, sources: Items[DraftSource], settings: DraftSettings, budget: DraftBudget[Any]) -> None:
        self.sources = sources
        self.settings = settings
        self.budget = budget
        self._step = 0

    @property
    def resting(self) -> bool:
        """Whether `ask` will send for nothing, whatever is planned."""
        return not self.sources or self.budget.resting

    def ask(self, plans: Items[SequencePlan]) -> Asked:
        """Choose what to draft for the sequences that decode, and send for it."""
        wishes = [Wish(plan, self._selection(plan)) for plan in plans if self._may_draft(plan)]
        ask = self.budget.ask(plans, wishes)
        orders = [self._order(wish, ask) for wish in wishes if wish.id in ask.nodes]
        asked: list[DraftSource] = []
        if orders:
            self._step += 1
            asked = [source for source in self.sources if source.send(self._step, orders)]
        else:
            self.flush()
        if ask.opening:
            for source in self.sources:
                source.open(ask.opening)
        return Asked(plans, wishes, ask, asked, self._step, time.monotonic() + self.settings.timeout_s)

    def collect(self, asked: Asked) -> dict[int, MergedDraft]:
        """A draft for every sequence that decodes, by sequence id; one node where nobody drafted in time."""
        drafts = self.budget.merge(asked.ask, asked.wishes, self._receive(asked) if asked.sources else None)
        decoding = [plan.sequence for plan in asked.plans if plan.decodes]
        return {s.id: drafts.get(s.id) or MergedDraft.root_only(s.tokens[-1]) for s in decoding}

    def forget(self, sequence: Sequence) -> None:
        self.budget.forget(sequence.id)
        for source in self.sources:
            source.forget(sequence)

    def flush(self) -> None:
        for source in self.sources:
            source.flush()

    def _may_draft(self, plan: SequencePlan) -> bool:
        deferred = self.budget.defers_first_drafts and plan.computes_prompt
        return plan.draft_nodes > 0 and bool(self.sources) and not deferred

    def _selection(self, plan: SequencePlan) -> ChildSelection:
        return resolve_rule(self.settings.rule, plan.sequence.request.sampling).selection

    def _order(self, wish: Wish, ask: Ask) -> DraftOrder:
        nodes = ask.nodes[wish.id]
        if wish.selection is ChildSelection.SAMPLED:
            # Merged sampled trees can be cut by whole levels only, so that each gets its share of the budget.
            nodes = max(1, nodes // max(1, sum(source.models for source in self.sources)))
        plan = wish.plan
        return DraftOrder(
            plan.sequence, nodes, plan.draft_depth, self.settings.widths, wish.selection, ask.floor, ask.models
        )

    def _receive(self, asked: Asked) -> dict[int, list[TokenTree]]:
        trees: dict[int, list[TokenTree]] = {}
        for source in asked.sources:
            for sequence_id, drafted in source.receive(asked.step, asked.deadline).items():
                trees.setdefault(sequence_id, []).extend(drafted)
        return trees
