"""What drafts have proved to be worth: measured acceptance by source and depth, gain by size, and the time they took.

All of it fades: old measurements weigh less than new ones. It steers how much is drafted and kept, never the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from speculation.tree import TokenTree

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# Trees that a prior weighs as much as, and that are remembered.
_PRIOR_TREES = 3.0
RELIABILITY_MEMORY = 256.0
GAIN_MEMORY = 64.0
_LEAST_RATIO, _MOST_RATIO = 0.001, 4.0
# A draft that makes no estimate: each level is half as likely as the one above.
_GUESS = 0.5


class Reliability:
    """How many nodes of a source came true at each depth, against how many its confidences promised:

    ratio(d) = (accepted at d + c) / (sum of exp(confidence) at d + c), over the verified nodes, c: weight of the prior.
    """

    def __init__(self) -> None:
        self._hits: dict[tuple[str, int], float] = {}
        self._promised: dict[tuple[str, int], float] = {}

    def ratio(self, source: str, depth: int) -> float:
        """What a promise of this source at this depth is to be multiplied by."""
        key = (source, depth)
        # One tree promises about 2^-depth at a depth: the prior weighs as much as _PRIOR_TREES of them.
        prior = _PRIOR_TREES * 2.0**-depth
        ratio = (self._hits.get(key, 0.0) + prior) / (self._promised.get(key, 0.0) + prior)
        return min(max(ratio, _LEAST_RATIO), _MOST_RATIO)

    def correct(self, tree: TokenTree) -> TokenTree:
        """The tree with confidences as measurements make them; a child stays at most as sure as its parent."""
        promised = promises(tree)
        depths = tree.depths()
        scale = [math.log(self.ratio(tree.source, depth)) for depth in range(max(depths) + 1)]
        confidences = [0.0] * len(tree)
        for node in range(1, len(tree)):
            confidences[node] = min(promised[node] + scale[depths[node]], confidences[tree.parents[node]])
        return tree.with_confidences(tuple(confidences))

    def learn(
        self, tree: TokenTree, verified: Sequence[bool], accepted: Sequence[bool], memory: float = RELIABILITY_MEMORY
    ) -> None:
        """Compare what a tree promised of the nodes that were verified with what was accepted of them.

        memory: how many trees are remembered; fewer where trees are rare, so that it is not too long ago.
        """
        promised, hits = promises(tree), [0.0] * len(tree)
        sums: dict[int, float] = {}
        depths = tree.depths()
        for node in range(1, len(tree)):
            if verified[node]:
                depth = depths[node]
                sums[depth] = sums.get(depth, 0.0) + math.exp(promised[node])
                hits[depth] += accepted[node]
        keep = 1 - 1 / memory
        for depth, total in sums.items():
            key = (tree.source, depth)
            self._promised[key] = keep * self._promised.get(key, 0.0) + total
            self._hits[key] = keep * self._hits.get(key, 0.0) + hits[depth]


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

    sizes: the k that are told apart, and expected: float64 [sizes], what each is thought to bring.
    prior: of one node, before anything was measured; each further one adds half of what the one before added.
    """

    def __init__(self, sizes: Sequence[int], prior: float = 0.7) -> None:
        self.sizes = tuple(sizes)
        self.expected = np.array([prior * (2 - 0.5 ** (size - 1)) for size in sizes])
        self._weights = np.full(len(sizes), _PRIOR_TREES)

    def learn(self, probabilities: Sequence[float], asked: int, memory: float = GAIN_MEMORY) -> None:
        """probabilities: of the paths of a tree's nodes, falling; 1 for those known to be right. asked: its room."""
        sums = np.cumsum([0.0, *probabilities])
        for index, size in enumerate(self.sizes):
            if size <= asked:
                weight = self._weights[index] = min(self._weights[index] + 1, memory)
                self.expected[index] += (sums[min(size, len(sums) - 1)] - self.expected[index]) / weight


class LinearFit:
    """y = w . x by least squares with forgetting; directions that were not seen lately stay at the prior."""

    def __init__(self, prior: Sequence[float], confidence: Sequence[float], memory: float = 100.0) -> None:
        """confidence: how many measurements of 1 the prior of each weight is worth."""
        self._prior = np.array(prior, dtype=np.float64)
        self._ridge = np.diag(np.array(confidence, dtype=np.float64))
        self._keep = 1 - 1 / memory
        self._products = np.zeros((len(prior), len(prior)))
        self._targets = np.zeros(len(prior))
        self.weights = self._prior

    def predict(self, features: Sequence[float]) -> float:
        return float(self.weights @ np.array(features))

    def observe(self, features: Sequence[float], value: float) -> None:
        x = np.array(features, dtype=np.float64)
        self._products = self._keep * self._products + np.outer(x, x)
        self._targets = self._keep * self._targets + x * value
        self.weights = _solve(self._products + self._ridge, self._targets + self._ridge @ self._prior)


def _solve(matrix: Floats, right: Floats) -> Floats:
    """x of matrix x = right, for a small positive definite matrix, by Gauss-Jordan elimination.

    LAPACK would start threads for it, which go on spinning beside the kernels' own.
    """
    rows = np.column_stack((matrix, right))
    for pivot in range(len(right)):
        rows[pivot] /= rows[pivot, pivot]
        for other in range(len(right)):
            if other != pivot:
                rows[other] -= rows[other, pivot] * rows[pivot]
    return rows[:, -1].copy()
