"""Which of the ways to draft pays, for which sequences, and whether it may: held for a while, since it takes time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from services.verifier.budget import Wish
from services.verifier.draft_options import Option, Options
from services.verifier.sequence import Sequence as RunningSequence
from services.verifier.step_prices import StepPrices
from speculation.budget import Choice, Floats, StepPrice, choose_alone, choose_drafting
from speculation.by_load import ByLoad
from speculation.children import ChildSelection
from speculation.experience import Gain, Mean
from speculation.guard import Guards

# Steps that what was reckoned holds for; fewer in the beginning: one for so many known steps at this load.
_HOLD_STEPS, _HOLD_SHARE = 32, 4
# Kinds of steps that it is kept of.
_MOST_HELD = 64
# More is not believed of nodes that go where they are worth most.
_MOST_BY_SHARING = 2.0


@dataclass
class Reckoned:
    """What holds until the step number `until` for steps of as many rows and decoding sequences.

    choice: None before it is needed. ids: of the sequences that it was made for. drawn: sizes of trees with sampled
    children, by sequence id; 0 where none pays.
    """

    price: StepPrice
    rows: int
    until: int
    choice: Choice | None = None
    ids: tuple[int, ...] = ()
    drawn: dict[int, int] = field(default_factory=dict)

    def fits(self, ids: tuple[int, ...]) -> bool:
        """Whether the choice is for these sequences too: what is chosen for all or none is for any."""
        if self.choice is None:
            return False
        return ids == self.ids or (len(self.choice.chosen) in (0, len(self.ids)) and len(ids) == len(self.ids))


class DraftChooser:
    """Maximises tokens per second by what is known of gains, costs and prices, where the guards allow it.

    own_gains: by id of the sequences with sampled children, about which nothing is learned from others.

    It reckons with equal trees of all sequences. What it gains that nodes are kept where they are worth most, be it of
    few trees, is learned for each load.
    """

    def __init__(self, options: Options, prices: StepPrices, guards: Guards, most_nodes: int) -> None:
        self.own_gains: dict[int, Gain] = {}
        self._options = options
        self._prices = prices
        self._guards = guards
        self._most_nodes = most_nodes
        self._known: dict[int, int] = {}  # how many tokens of a sequence the drafts have
        self._sharing = ByLoad(lambda many: Mean(1.0))
        self._steps = 0
        self._reckoned: dict[tuple[int, int], Reckoned] = {}

    def reckon(self, decoding: int, rows: int) -> Reckoned:
        """What was reckoned lately of a step like this one; else the price alone."""
        self._steps += 1
        held = self._reckoned.get((decoding, rows))
        if held is None or held.until <= self._steps:
            if len(self._reckoned) >= _MOST_HELD:
                self._reckoned.clear()
            price = self._prices.price(rows, decoding, decoding * self._most_nodes)
            until = self._steps + 1 + min(self._guards.at(decoding)[0].known // _HOLD_SHARE, _HOLD_STEPS)
            held = self._reckoned[decoding, rows] = Reckoned(price, rows, until)
        return held

    def reckon_anew(self) -> None:
        """What was just learned counts at once."""
        self._reckoned.clear()

    def choice(self, reckoned: Reckoned, wishes: Sequence[Wish], *, begins: bool) -> Choice | None:
        """The best way to draft, if any pays and its guard allows it. For sequences without sampled children.

        begins: whether the step before had no drafts that pay.
        """
        ids = tuple([wish.id for wish in wishes])
        choice = reckoned.choice
        if choice is None or not reckoned.fits(ids):
            guards = self._guards.at(reckoned.price.tokens)
            hopes = [guard.hope if guard.ready else 0.0 for guard in guards]
            if not any(hopes):
                return None
            sharing = self._sharing.at(reckoned.price.tokens).value
            choice = reckoned.choice = self._best(reckoned.price, wishes, hopes, sharing)
            reckoned.ids = ids
        return choice if choice.chosen and self._allows(reckoned, choice, begins=begins) else None

    def _allows(self, reckoned: Reckoned, choice: Choice, *, begins: bool) -> bool:
        sequences, way = reckoned.price.tokens, self._options.way(self._options.all[choice.option])
        gain = choice.hoped_rate * reckoned.price.of(0) / sequences
        if not self._guards.allow(sequences, way, gain, begins=begins):
            return False
        known = self._guards.at(sequences)[way].steps
        reckoned.until = min(reckoned.until, self._steps + 1 + known // _HOLD_SHARE)
        return True

    def drawn(self, reckoned: Reckoned, wishes: Sequence[Wish]) -> dict[int, int]:
        """Sizes of trees with sampled children, by id of the sequences where one pays: each by what came of its own.

        One that meets the noise of another, because it has its prompt and its seed, must not know what became of it.
        """
        if reckoned.drawn.keys() != {wish.id for wish in wishes}:
            option, price = self._options.whole[0], reckoned.price
            once, each, level, fresh = option.cost.at(price.tokens).solve()
            new = np.array([self._catching_up(wish) for wish in wishes])
            depth = np.array([[option.depth_of(size)] for size in self._options.sizes])
            seconds = np.maximum(once / len(wishes) + each + level * depth + fresh * new, 0) / 1000
            own = [self.own_gains.setdefault(wish.id, Gain(self._options.sizes)).expected for wish in wishes]
            bounds = [min(wish.plan.draft_nodes, wish.plan.draft_depth) for wish in wishes]
            gains = np.minimum(np.array(own).T, bounds)
            chosen = choose_alone(price, seconds, self._options.sizes, gains)
            reckoned.drawn = {wish.id: size for wish, size in zip(wishes, chosen, strict=True)}
        return {sequence_id: size for sequence_id, size in reckoned.drawn.items() if size}

    def _best(self, price: StepPrice, wishes: Sequence[Wish], hopes: Sequence[float], sharing: float) -> Choice:
        """hopes: what the gains of each way are taken times, 0 for one that may not draft."""
        places = [place for place, option in enumerate(self._options.all) if hopes[self._options.way(option)]]
        options = [self._options.all[place] for place in places]
        hope = np.array([hopes[self._options.way(option)] for option in options])
        solved = {cost: np.maximum(cost.at(price.tokens).solve(), 0) / 1000 for cost in self._options.costs}
        weights = np.array([solved[option.cost] for option in options])
        asked = [self._options.asked(size, len(wishes)) for size in self._options.sizes]
        depth = np.array([[option.depth_of(nodes) for nodes in asked] for option in options])
        fresh = np.array([self._catching_up(wish) for wish in wishes])
        each = (weights[:, 1, None] + weights[:, 2, None] * depth)[:, :, None] + np.outer(weights[:, 3], fresh)[:, None]
        tables = {way: self._gains(options, way) for way in {wish.selection for wish in wishes}}
        own = [tables[wish.selection] for wish in wishes]
        bounds = np.array([min(wish.plan.draft_nodes, wish.plan.draft_depth) for wish in wishes])
        gains = np.minimum(np.stack(own, axis=2), bounds)
        choice = choose_drafting(price, weights[:, 0], each, self._options.sizes, gains, hope, sharing)
        return replace(choice, option=places[choice.option])

    def _gains(self, options: Sequence[Option], selection: ChildSelection) -> Floats:
        """Expected accepted tokens [options, sizes]."""
        return np.array([option.gains[selection].expected for option in options])

    def learn_sharing(self, sequences: int, times: float) -> None:
        """The nodes that were kept of several trees give `times` the rate that was reckoned with equal ones."""
        self._sharing.at(sequences).learn(min(max(times, 1.0), _MOST_BY_SHARING))

    def fresh(self, wish: Wish) -> int:
        """How many of its tokens are new to the drafts."""
        return len(wish.plan.sequence.tokens) - self._known.get(wish.id, 0)

    def _catching_up(self, wish: Wish) -> float:
        """Of its fresh tokens this step's share: what catches up once is of use in all later steps, two tokens each."""
        return self.fresh(wish) / max(1.0, wish.plan.sequence.remaining / 2)

    def is_unknown(self, wish: Wish) -> bool:
        """Whether the drafts know nothing of the sequence."""
        return wish.id not in self._known

    def told(self, sequence: RunningSequence) -> None:
        """The drafts get to know its tokens."""
        self._known[sequence.id] = len(sequence.tokens)

    def state(self) -> dict[str, Sequence[float]]:
        """What was learned, for JSON. From any thread."""
        return {load: mean.state() for load, mean in self._sharing.items()}

    def restore(self, state: Mapping[str, Sequence[float]], share: float) -> None:
        """Raises ValueError or TypeError when it is of another form."""
        for mean, kept in self._sharing.kept(state):
            mean.restore(kept, share)

    def forget(self, sequence_id: int) -> None:
        self._known.pop(sequence_id, None)
        self.own_gains.pop(sequence_id, None)
