"""What drafts have proved to be worth: measured acceptance by source and depth, gain by size, and the time they took.

All of it fades: old measurements weigh less than new ones. It steers how much is drafted and kept, never the output.
Each class gives its state as what JSON can hold, and takes it back with a share of its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import Any

import numpy as np

from speculation.tree import TokenTree

# Trees that a prior weighs as much as, and that are remembered.
_PRIOR_TREES = 4.0
RELIABILITY_MEMORY = 128.0
GAIN_MEMORY = 64.0
_LEAST_RATIO, _MOST_RATIO = 0.001, 4.0
# A draft that makes no estimate: each level is half as likely as the one above.
_GUESS = 0.5


class Reliability:
    """How many nodes of a source came true at each depth, against how many its confidences promised:

    ratio(d) = (accepted at d + c) / (sum of exp(confidence) at d + c), over the verified nodes, c: weight of the prior.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[list[float]]] = {}  # by source and depth: accepted, promised
        self._scales: dict[str, list[float]] = {}  # log of the ratios, of sources about which nothing new is known

    def ratio(self, source: str, depth: int) -> float:
        """What a promise of this source at this depth is to be multiplied by."""
        counts = self._counts.get(source, [])
        hits, promised = counts[depth] if depth < len(counts) else (0.0, 0.0)
        # One tree promises about 2^-depth at a depth: the prior weighs as much as _PRIOR_TREES of them.
        prior = _PRIOR_TREES * 2.0**-depth
        return min(max((hits + prior) / (promised + prior), _LEAST_RATIO), _MOST_RATIO)

    def scales(self, source: str) -> list[float]:
        """The logarithms of the ratios by depth; about deeper nodes nothing is known."""
        if (scales := self._scales.get(source)) is None:
            depths = range(len(self._counts.get(source, ())))
            scales = self._scales[source] = [math.log(self.ratio(source, depth)) for depth in depths]
        return scales

    def corrected(self, tree: TokenTree) -> list[float]:
        """The confidences as measurements make them; a child stays at most as sure as its parent."""
        scales = self.scales(tree.source)
        known = len(scales)
        depth, confidences = [0], [0.0]
        for parent, promised in zip(tree.parents[1:], promises(tree)[1:], strict=True):
            below = depth[parent] + 1
            depth.append(below)
            confidence = promised + scales[below] if below < known else promised
            confidences.append(min(confidence, confidences[parent]))
        return confidences

    def learn(
        self,
        tree: TokenTree,
        verified: Iterable[int],
        accepted: AbstractSet[int],
        memory: float = RELIABILITY_MEMORY,
    ) -> None:
        """Compare what a tree promised of the nodes that were verified with those that were accepted.

        memory: how many trees are remembered; fewer where trees are rare, so that it is not too long ago.
        """
        promised, depths = promises(tree), tree.depths()
        sums: dict[int, list[float]] = {}
        for node in verified:
            if node > 0:
                here = sums.setdefault(depths[node], [0.0, 0.0])
                here[0] += node in accepted
                here[1] += math.exp(promised[node])
        counts = self._counts.setdefault(tree.source, [])
        keep = 1 - 1 / memory
        for depth, (hits, total) in sums.items():
            while len(counts) <= depth:
                counts.append([0.0, 0.0])
            counts[depth] = [keep * counts[depth][0] + hits, keep * counts[depth][1] + total]
        self._scales.pop(tree.source, None)

    def state(self) -> dict[str, list[list[float]]]:
        return {source: list(counts) for source, counts in list(self._counts.items())}

    def restore(self, state: dict[str, list[list[float]]], share: float) -> None:
        for source, counts in state.items():
            self._counts[source] = [[share * hits, share * promised] for hits, promised in counts]


def promises(tree: TokenTree) -> Sequence[float]:
    """The confidences that a tree came with, or a guess by depth and place where it makes no estimate."""
    if tree.confidences:
        return tree.confidences
    guess = math.log(_GUESS)
    promised = [0.0] * len(tree)
    siblings = [0] * len(tree)
    for node, parent in enumerate(tree.parents[1:], start=1):
        siblings[parent] += 1
        promised[node] = promised[parent] + siblings[parent] * guess
    return promised


class Gain:
    """Accepted draft tokens to expect of a tree of up to k nodes, kept the most probable first.

    sizes: the k that are told apart, and expected: what each is thought to bring.
    prior: of one node, before anything was measured; each further one adds half of what the one before added.
    """

    def __init__(self, sizes: Sequence[int], prior: float = 0.7) -> None:
        self.sizes = tuple(sizes)
        self.expected = [prior * (2 - 0.5 ** (size - 1)) for size in sizes]
        self._weights = [_PRIOR_TREES] * len(sizes)

    def learn(self, probabilities: Sequence[float], asked: int, memory: float = GAIN_MEMORY) -> None:
        """probabilities: of the paths of a tree's nodes, falling; 1 for those known to be right. asked: its room.

        Larger trees are thought to bring as much more, or less, as the largest of which this tells.
        """
        sums = list(accumulate(probabilities, initial=0.0))
        change = 0.0
        for index, size in enumerate(self.sizes):
            if size <= asked:
                weight = self._weights[index] = min(self._weights[index] + 1, memory)
                change = (sums[min(size, len(sums) - 1)] - self.expected[index]) / weight
            self.expected[index] += change

    def state(self) -> list[list[float]]:
        return [list(self.expected), list(self._weights)]

    def restore(self, state: list[list[float]], share: float) -> None:
        """Raises ValueError when it is of other sizes."""
        for index, (expected, weight) in enumerate(zip(*state, strict=True)):
            if index >= len(self.sizes):
                raise ValueError(f"gains of {len(state[0])} sizes, not of {len(self.sizes)}")
            self.expected[index], self._weights[index] = float(expected), max(_PRIOR_TREES, share * weight)


class Mean:
    """Of a positive quantity, with forgetting.

    prior: before anything was measured, worth as much as one measurement.
    """

    def __init__(self, prior: float, memory: float = GAIN_MEMORY) -> None:
        self.value = prior
        self._weight = 1.0
        self._memory = memory

    def learn(self, value: float) -> None:
        self._weight = min(self._weight + 1, self._memory)
        self.value += (value - self.value) / self._weight

    def state(self) -> list[float]:
        return [self.value, self._weight]

    def restore(self, state: Sequence[float], share: float) -> None:
        """Raises ValueError or TypeError when it is of another form."""
        value, weight = map(float, state)
        self.value, self._weight = value, max(1.0, share * weight)


class LinearFit:
    """y = w . x by least squares with forgetting; directions that were not seen lately stay at the prior."""

    def __init__(self, prior: Sequence[float], confidence: Sequence[float], memory: float = 100.0) -> None:
        """confidence: how many measurements of 1 the prior of each weight is worth."""
        self._prior = [float(weight) for weight in prior]
        self._confidence = [float(weight) for weight in confidence]
        self._keep = 1 - 1 / memory
        self._products = [[0.0] * len(prior) for _ in prior]
        self._targets = [0.0] * len(prior)
        self.weights = self._prior
        self._solved = True  # whether the weights know all that was observed

    def solve(self) -> list[float]:
        """The weights anew, by all that was observed; until the next time predictions are made with these."""
        if self._solved:
            return self.weights
        self._solved = True
        matrix = np.array(self._products) + np.diag(self._confidence)
        right = np.array(self._targets) + np.multiply(self._confidence, self._prior)
        self.weights = np.linalg.solve(matrix, right).tolist()
        return self.weights

    def predict(self, features: Sequence[float]) -> float:
        return sum([weight * x for weight, x in zip(self.weights, features, strict=True)])

    def observe(self, features: Sequence[float], value: float) -> None:
        self._solved = False
        keep = self._keep
        for row, (x, products) in enumerate(zip(features, self._products, strict=True)):
            self._products[row] = [keep * old + x * y for old, y in zip(products, features, strict=True)]
            self._targets[row] = keep * self._targets[row] + x * value

    def state(self) -> dict[str, Any]:
        return {"products": list(self._products), "targets": list(self._targets)}

    def restore(self, state: dict[str, Any], share: float) -> None:
        """Raises ValueError when it is of another number of weights."""
        products, targets = state["products"], state["targets"]
        if [len(row) for row in products] != [len(self._prior)] * len(self._prior) or len(targets) != len(self._prior):
            raise ValueError(f"a fit of {len(targets)} weights, not of {len(self._prior)}")
        self._products = [[share * value for value in row] for row in products]
        self._targets = [share * value for value in targets]
        self._solved = False
        self.solve()
