"""How much a step drafts and verifies: what every way to decide has in common, and the way without measurements.

Knows nothing of the network or the clock. Nothing that is decided here changes a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from speculation.acceptance import Accepted
from speculation.children import ChildSelection
from speculation.merge import MergedDraft, merge_trees
from speculation.tree import TokenTree


@dataclass(frozen=True)
class Wish:
    """One sequence that may draft: its plan, and how a draft for its acceptance rule chooses children."""

    plan: SequencePlan
    selection: ChildSelection

    @property
    def id(self) -> int:
        return self.plan.sequence.id


@dataclass
class Ask:
    """What the speculators are asked for in a step; a budget may add what it remembers of the step.

    nodes: by sequence id. models: whether small models draft, or look-up alone. floor: probability of a path below
    which small models need not go on. opening: sequences that will draft later, for which speculators can prepare
    while the LLM computes.
    """

    nodes: dict[int, int] = field(default_factory=dict)
    opening: Sequence[RunningSequence] = ()
    models: bool = True
    floor: float = 0.0


A = TypeVar("A", bound=Ask)


class DraftBudget(ABC, Generic[A]):
    """Decides before the speculators are asked and after they have answered; learns from what came of it.

    Called in the order ask, merge, learn, once for each step; the next step may be asked for before this one teaches.
    Only the engine's thread calls it.
    """

    defers_first_drafts = False
    """Whether steps that compute a sequence's prompt do without its draft, for which its first token would wait."""

    @property
    def resting(self) -> bool:
        """Whether the next step will draft nothing whatever it decodes, so that drafts need not be planned for."""
        return False

    @abstractmethod
    def ask(self, plans: Sequence[SequencePlan], wishes: Sequence[Wish]) -> A:
        """What to draft. plans: of the whole step. wishes: of the sequences that may draft."""

    @abstractmethod
    def merge(
        self, step: A, wishes: Sequence[Wish], trees: Mapping[int, list[TokenTree]] | None
    ) -> dict[int, MergedDraft]:
        """The drafts to verify, of the sequences that have one.

        step: what `ask` returned. trees: what came; None when nobody could be asked.
        """

    @abstractmethod
    def learn(self, step: A, accepted: Mapping[int, Accepted], draft_seconds: float, step_seconds: float) -> None:
        """What came of the step: draft_seconds until its drafts were merged, step_seconds from there on."""

    @abstractmethod
    def forget(self, sequence_id: int) -> None:
        """The sequence has ended."""


class WholeDrafts(DraftBudget[Ask]):
    """Drafts what the bounds allow, whether it pays or not."""

    def ask(self, plans: Sequence[SequencePlan], wishes: Sequence[Wish]) -> Ask:
        return Ask({wish.id: wish.plan.draft_nodes for wish in wishes})

    def merge(
        self, step: Ask, wishes: Sequence[Wish], trees: Mapping[int, list[TokenTree]] | None
    ) -> dict[int, MergedDraft]:
        found = trees or {}
        return {wish.id: merge_trees(found[wish.id], wish.plan.draft_nodes) for wish in wishes if wish.id in found}

    def learn(self, step: Ask, accepted: Mapping[int, Accepted], draft_seconds: float, step_seconds: float) -> None:
        pass

    def forget(self, sequence_id: int) -> None:
        pass
