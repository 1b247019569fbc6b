"""The ways to draft that a budget chooses among, what each has cost and what it has brought."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from services.verifier.candidates import Candidate
from speculation.budget import StepPrice
from speculation.by_load import ByLoad
from speculation.children import ChildSelection
from speculation.experience import Gain, LinearFit
from speculation.guard import AFTERMATH

# Least probabilities of a path behind which small models go on that are told apart.
FLOORS = (0.0, 0.1, 0.25, 0.5)
# Of trees, before any was seen; and what a new one weighs.
_DEPTH, _SMOOTHING = 3.0, 0.05
# Milliseconds before anything was measured, and how sure each is. Where many decode, a surprise is taken for the round
# trip's first: what the drafts of one of them cost must not make those of all look dear.
_COSTS, _SURE_OF_ONE, _SURE_OF_MANY = (0.6, 0.05, 0.03, 0.01), (4, 4, 16, 400), (1, 8, 400, 4000)
# Nodes that a tree among several has room for, times those that pay in the mean.
_ROOM = 3
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)


class Cost:
    """Milliseconds: of a round trip, of a sequence, of a level of its tree, of a token that is new to the drafts.

    Of each load apart: what the step before hands out for all sequences keeps the cores from drafting, and many draft
    cheaper together than one after the other.
    """

    def __init__(self) -> None:
        self._fits = ByLoad(lambda many: LinearFit(_COSTS, _SURE_OF_MANY if many else _SURE_OF_ONE))
        self.idle_steps = 0  # since it was last measured, while no step drafts
        self.measured = 0

    def at(self, sequences: int) -> LinearFit:
        return self._fits.at(sequences)

    def seconds(self, sequences: int, features: Sequence[float]) -> float:
        return max(0.0, self.at(sequences).predict(features)) / 1000

    def learn(self, sequences: int, features: Sequence[float], seconds: float, believed: float) -> None:
        self.at(sequences).observe(features, 1000 * tamed(seconds, believed))

    def state(self) -> dict[str, Any]:
        return {"fits": {load: fit.state() for load, fit in self._fits.items()}, "measured": self.measured}

    def restore(self, state: dict[str, Any], share: float) -> None:
        """Raises ValueError or TypeError when it is of another form."""
        for fit, kept in self._fits.kept(state["fits"]):
            fit.restore(kept, share)
        self.measured = int(state["measured"])


class Option:
    """One way to draft, and what it brings: with models that go on behind paths of at least `floor`, or by look-up.

    gains: by what chooses the children; of sampled ones each sequence has its own instead.
    depths: by size, how deep a tree of so many nodes is in the mean.
    """

    def __init__(self, models: bool, floor: float, sizes: Sequence[int], cost: Cost) -> None:
        self.models = models
        self.floor = floor
        self._sizes = sizes
        self.cost = cost
        self.gains = {selection: Gain(sizes) for selection in (ChildSelection.TOP, ChildSelection.SHARED_NOISE)}
        self.depths = [min(float(size), _DEPTH) for size in sizes]

    def learn_depths(self, depths: Sequence[int], asked: int) -> None:
        """depths: of the nodes of a tree, the most probable first. asked: its room."""
        deepest = list(accumulate(depths, max, initial=0))
        for index, size in enumerate(self._sizes):
            if size <= asked:
                self.depths[index] += _SMOOTHING * (deepest[min(size, len(depths))] - self.depths[index])

    def depth_of(self, nodes: int) -> float:
        """Of a tree of so many nodes."""
        return self.depths[max(bisect_right(self._sizes, nodes) - 1, 0)]

    def tells_of(self, other: Option) -> bool:
        """Whether what is drafted in this way shows what the other way would have drafted."""
        return self.models == other.models and self.floor <= other.floor


class Options:
    """With models at each floor, and last by look-up alone.

    sizes: numbers of nodes that trees are thought to be pruned to.
    """

    def __init__(self, most_nodes: int) -> None:
        self.sizes = sizes = [size for size in _SIZES if size < most_nodes] + [most_nodes]
        with_models, look_up = Cost(), Cost()
        self.costs = (with_models, look_up)
        self.all = [Option(True, floor, sizes, with_models) for floor in FLOORS]
        self.all.append(Option(False, 0.0, sizes, look_up))

    def asked(self, size: int, sequences: int) -> int:
        """Nodes to ask for where `size` of each tree pay in the mean: of a single tree the next size. Several share the
        nodes by what each is worth, so that some are much larger; more would only take the small models' time.
        """
        if sequences > 1:
            return min(_ROOM * size, self.sizes[-1])
        return self.sizes[min(self.sizes.index(size) + 1, len(self.sizes) - 1)]

    @property
    def whole(self) -> tuple[Option, Option]:
        """With models and without, of no floor: what they draft tells of all others."""
        return self.all[0], self.all[-1]

    def way(self, option: Option) -> int:
        """Place of its cost: what is told apart by the clock."""
        return self.costs.index(option.cost)

    def learn(
        self, option: Option, selection: ChildSelection, candidate: Candidate | None, asked: int, memory: float
    ) -> None:
        """What a draft of all `asked` nodes, made in this way, tells of it and of stricter ones; None: nothing came."""
        ranked: list[tuple[float, float, int]] = []  # probability of the path, of that to its parent, depth
        if candidate is not None:
            chances = [math.exp(confidence) for confidence in candidate.confidences]
            below = zip(chances, candidate.tree.parents, candidate.tree.depths(), strict=True)
            ranked = sorted(
                [(chance, chances[parent], depth) for chance, parent, depth in below if depth], reverse=True
            )
        for other in self.all:
            if option.tells_of(other):
                floor = other.floor if other.floor > option.floor else 0.0
                drafted = [(chance, depth) for chance, above, depth in ranked if above >= floor]
                other.gains[selection].learn([chance for chance, _ in drafted], asked, memory)
                other.learn_depths([depth for _, depth in drafted], asked)

    def state(self) -> dict[str, Any]:
        return {
            "costs": [cost.state() for cost in self.costs],
            "options": [
                {
                    "depths": list(option.depths),
                    "gains": {name.value: gain.state() for name, gain in option.gains.items()},
                }
                for option in self.all
            ],
        }

    def restore(self, state: dict[str, Any], share: float) -> None:
        """Raises ValueError or TypeError when it is of another form."""
        for cost, kept in zip(self.costs, state["costs"], strict=True):
            cost.restore(kept, share)
        for option, kept in zip(self.all, state["options"], strict=True):
            for selection, gain in option.gains.items():
                gain.restore(kept["gains"][selection.value], share)
            option.depths = [float(depth) for _, depth in zip(self.sizes, kept["depths"], strict=True)]


class IdleTrials:
    """When one sequence drafts though it does not pay, to see what drafting costs and brings by now.

    Its cost, that of slower steps behind it included, is a small share of the time since the last trial. The first ones
    come sooner: little is known.
    """

    SHARE, FIRST_SHARE = 0.0015, 0.005
    LEAST_STEPS, FIRST_STEPS = 64, 16
    FIRST = 2  # of each way, which come sooner
    ROWS_SHARE = 0.3  # of a plain step, which a trial may add by its rows

    def due(self, options: Options, price: StepPrice, most_nodes: int, fresh: float) -> Option | None:
        """The option to try in this step, in which nothing else drafts.

        most_nodes, fresh: of the sequence that would draft; its most nodes, and the tokens that are new to the drafts.
        """
        self.wait(options)
        for option in options.whole:
            cost = option.cost
            if cost.idle_steps >= self.FIRST_STEPS and cost.idle_steps >= self._interval(
                option, price, most_nodes, fresh
            ):
                return option
        return None

    def wait(self, options: Options) -> None:
        """A step went by."""
        for cost in options.costs:
            cost.idle_steps += 1

    def nodes(self, price: StepPrice, most_nodes: int) -> int:
        """How many nodes a trial verifies: two at least where there is room, more where rows cost little."""
        most = (1 + self.ROWS_SHARE) * price.of(0)
        cheap = int(np.count_nonzero(price.seconds[1 : most_nodes + 1] <= most))
        return min(max(cheap, 2), most_nodes)

    def _interval(self, option: Option, price: StepPrice, most_nodes: int, fresh: float) -> float:
        measured = option.cost.measured
        if measured == 0:
            return self.FIRST_STEPS
        nodes = self.nodes(price, most_nodes)
        verifying = price.of(nodes) - price.of(0)
        drafting = option.cost.seconds(price.tokens, (1, 1, option.depth_of(nodes), fresh))
        first = measured <= self.FIRST
        least, share = (self.FIRST_STEPS << measured, self.FIRST_SHARE) if first else (self.LEAST_STEPS, self.SHARE)
        return max(least, ((drafting + verifying) / price.of(0) + AFTERMATH) / share)


def tamed(value: float, expected: float) -> float:
    """A measurement within a factor of 3: a disturbance must not be believed at once."""
    return min(max(value, expected / 3), 3 * expected)
