"""Which of the ways to draft pays, for which sequences, and whether it may: held for a while, since it takes time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.verifier.budget import Wish
from services.verifier.draft_options import Option, Options
from services.verifier.sequence import Sequence as RunningSequence
from services.verifier.step_prices import StepPrices
from speculation.budget import Choice, StepPrice, choose_drafting
from speculation.children import ChildSelection
from speculation.experience import Gain
from speculation.guard import Guards

# Steps that what was reckoned holds for; fewer in the beginning: one for so many drafted steps at this load.
_HOLD_STEPS, _HOLD_SHARE = 32, 4


@dataclass
class Reckoned:
    """What holds for `steps` more steps of as many rows and decoding sequences.

    choice: None before it is needed. ids: of the sequences that it was made for.
    """

    price: StepPrice
    rows: int
    steps: int = _HOLD_STEPS
    choice: Choice | None = None
    ids: tuple[int, ...] = ()

    def fits(self, ids: tuple[int, ...], sampled: bool) -> bool:
        """Whether the choice is for these sequences too: what is chosen for all or none is for any, but drawn ones."""
        if self.choice is None:
            return False
        for_any = not sampled and len(self.choice.chosen) in (0, len(self.ids)) and len(ids) == len(self.ids)
        return for_any or ids == self.ids


class DraftChooser:
    """Maximises tokens per second by what is known of gains, costs and prices, where the guards allow it.

    own_gains: by id of the sequences with sampled children, about which nothing is learned from others.
    """

    def __init__(self, options: Options, prices: StepPrices, guards: Guards, most_nodes: int) -> None:
        self.own_gains: dict[int, Gain] = {}
        self._options = options
        self._prices = prices
        self._guards = guards
        self._most_nodes = most_nodes
        self._known: dict[int, int] = {}  # how many tokens of a sequence the drafts have
        self._sampled_steps = 0
        self._reckoned: Reckoned | None = None

    def reckon(self, decoding: int, rows: int) -> Reckoned:
        """What was reckoned last, where the step is like it; else the price alone."""
        held = self._reckoned
        if held is None or held.steps <= 0 or held.rows != rows or held.price.tokens != decoding:
            held = self._reckoned = Reckoned(self._prices.price(rows, decoding, decoding * self._most_nodes), rows)
        held.steps -= 1
        return held

    def reckon_anew(self) -> None:
        """What was just learned counts at once."""
        self._reckoned = None

    def choice(self, reckoned: Reckoned, wishes: Sequence[Wish], sampled: bool) -> Choice | None:
        """The best way to draft, if any pays and its guard allows it, which knows nothing of sampled children."""
        guards = self._guards.at(reckoned.price.tokens)
        hopes = [1.0 if sampled else guard.hope if guard.ready else 0.0 for guard in guards]
        if not any(hopes):
            return None
        ids = tuple([wish.id for wish in wishes])
        if reckoned.choice is None or not reckoned.fits(ids, sampled):
            reckoned.choice, reckoned.ids = self._best(reckoned.price, wishes, hopes), ids
        choice = reckoned.choice
        return choice if choice.chosen and self._allows(reckoned, choice, sampled) else None

    def _allows(self, reckoned: Reckoned, choice: Choice, sampled: bool) -> bool:
        if sampled:
            self._sampled_steps += 1
            known = self._sampled_steps
        else:
            sequences, way = reckoned.price.tokens, self._options.way(self._options.all[choice.option])
            if not self._guards.allow(sequences, way, choice.hoped_rate * reckoned.price.seconds[0] / sequences):
                return False
            known = self._guards.at(sequences)[way].steps
        reckoned.steps = min(reckoned.steps, known // _HOLD_SHARE)
        return True

    def _best(self, price: StepPrice, wishes: Sequence[Wish], hopes: Sequence[float]) -> Choice:
        """hopes: what the gains of each way are taken times, 0 for one that may not draft."""
        places = [place for place, option in enumerate(self._options.all) if hopes[self._options.way(option)]]
        options = [self._options.all[place] for place in places]
        hope = np.array([hopes[self._options.way(option)] for option in options])
        solved = {cost: np.maximum(cost.at(price.tokens).solve(), 0) / 1000 for cost in self._options.costs}
        weights = np.array([solved[option.cost] for option in options])
        depth = np.array([option.depth for option in options])
        # What catches up once is of use in all later steps, about two tokens each.
        fresh = np.array([self.fresh(wish) / max(1.0, wish.plan.sequence.remaining / 2) for wish in wishes])
        each = (weights[:, 1] + weights[:, 2] * depth)[:, None] + np.outer(weights[:, 3], fresh)
        gains = np.array([[self._gain(option, wish) for wish in wishes] for option in options])
        bounds = np.array([min(wish.plan.draft_nodes, wish.plan.draft_depth) for wish in wishes])
        gains = np.minimum(gains, bounds[:, None]).transpose(0, 2, 1)
        choice = choose_drafting(price, weights[:, 0], each, self._options.sizes, gains, hope)
        return replace(choice, option=places[choice.option])

    def _gain(self, option: Option, wish: Wish) -> Sequence[float]:
        if wish.selection is not ChildSelection.SAMPLED:
            return option.gains[wish.selection].expected
        if option is self._options.all[0]:
            return self.own_gains.setdefault(wish.id, Gain(self._options.sizes)).expected
        return [0.0] * len(self._options.sizes)

    def fresh(self, wish: Wish) -> int:
        """How many of its tokens are new to the drafts."""
        return len(wish.plan.sequence.tokens) - self._known.get(wish.id, 0)

    def is_unknown(self, wish: Wish) -> bool:
        """Whether the drafts know nothing of the sequence."""
        return wish.id not in self._known

    def told(self, sequence: RunningSequence) -> None:
        """The drafts get to know its tokens."""
        self._known[sequence.id] = len(sequence.tokens)

    def forget(self, sequence_id: int) -> None:
        self._known.pop(sequence_id, None)
        self.own_gains.pop(sequence_id, None)
