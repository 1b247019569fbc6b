"""How much to draft, and which of the drafted nodes to verify: as much as makes tokens come fastest over a whole batch.

A step of the LLM over S sequences gives S tokens and one more for each accepted node. Both decisions maximise

    (S + expected accepted nodes) / (seconds of the step + seconds of drafting)

AdaServe and TurboSpec share a budget by load; here the price of a node is the measured time of its row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class StepPrice:
    """What a step costs that gives `tokens` tokens without drafts.

    seconds: float64 [most nodes + 1], by verified draft nodes. Never falling.
    """

    tokens: int
    seconds: Floats

    def of(self, nodes: int) -> float:
        """Seconds of the step with so many draft nodes."""
        return float(self.seconds[nodes])


@dataclass(frozen=True)
class Choice:
    """option: how to draft. chosen: which of the sequences, by their place; none for a plain step.

    size: nodes of each tree that this was reckoned with. tokens, seconds: to expect of the step and its drafts; what
        sharing saves is taken off the seconds.
    hoped: tokens that the choice was made for. sharing: as given.
    """

    option: int
    chosen: tuple[int, ...]
    size: int
    tokens: float
    seconds: float
    hoped: float
    sharing: float = 1.0

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds

    @property
    def hoped_rate(self) -> float:
        return self.hoped / self.seconds


def choose_drafting(
    step: StepPrice,
    once: Floats,
    each: Floats,
    sizes: Sequence[int],
    gains: Floats,
    hopes: Floats,
    sharing: float = 1.0,
) -> Choice:
    """How to draft, and for which sequences; of all equal sizes and all first m sequences by gain less cost, the best.

    once: float64 [options], seconds of a round trip for anybody. each: [options, sizes, sequences], what one adds.
    sizes: numbers of nodes that trees may be pruned to. gains: [options, sizes, sequences], expected accepted tokens of
        such a tree.
    hopes: float64 [options], what the gains are taken times to decide whether and for whom to draft; trees are as large
        as suits the gains themselves.
    sharing: what the rate becomes times when the nodes go where they are worth most, not in equal numbers to all.
    """
    plain = Choice(0, (), 0, step.tokens, step.of(0), step.tokens)
    if gains.shape[2] == 0:
        return plain
    lost = (each * plain.rate - hopes[:, None, None] * gains).min(axis=1)
    order = np.argsort(lost, axis=1, kind="stable")
    gained = np.cumsum(np.take_along_axis(gains, order[:, None], axis=2), axis=2)
    rows = np.minimum(np.outer(sizes, np.arange(1, gains.shape[2] + 1)), len(step.seconds) - 1)
    drafting = once[:, None, None] + np.cumsum(np.take_along_axis(each, order[:, None], axis=2), axis=2)
    seconds = (step.seconds[rows] + drafting) / sharing
    hoped = (step.tokens + hopes[:, None, None] * gained) / seconds
    option, _, most = np.unravel_index(int(np.argmax(hoped)), hoped.shape)
    size = int(np.argmax((step.tokens + gained[option, :, most]) / seconds[option, :, most]))
    chosen = tuple(sorted(order[option, : most + 1].tolist()))
    came, took = float(gained[option, size, most]), float(seconds[option, size, most])
    tokens, wanted = step.tokens + came, step.tokens + float(hopes[option]) * came
    best = Choice(int(option), chosen, sizes[size], tokens, took, wanted, sharing)
    return best if best.hoped_rate > plain.rate else plain


def choose_alone(step: StepPrice, seconds: Floats, sizes: Sequence[int], gains: Floats) -> list[int]:
    """The size of each sequence's tree with which tokens would come fastest if it alone drafted; 0 where none pays.

    seconds: float64 [sizes, sequences], of drafting. sizes: numbers of nodes. gains: float64 [sizes, sequences],
    expected accepted tokens. What is expected of one sequence decides nothing about another.
    """
    rows = np.minimum(sizes, len(step.seconds) - 1)
    rates = (step.tokens + gains) / (step.seconds[rows][:, None] + seconds)
    plain = step.tokens / step.of(0)
    return [sizes[size] if rate > plain else 0 for size, rate in zip(rates.argmax(0), rates.max(0), strict=True)]


def best_prefix(step: StepPrice, probabilities: Sequence[float]) -> tuple[int, float]:
    """How many of the nodes to verify, whose path probabilities fall, 0..len(probabilities), and the sum of theirs."""
    best, gained = 0, 0.0
    tokens = best_tokens = float(step.tokens)
    best_seconds, *dearer = step.seconds[: len(probabilities) + 1].tolist()
    for count, (probability, seconds) in enumerate(zip(probabilities, dearer, strict=False), start=1):
        tokens += probability
        if tokens * best_seconds > best_tokens * seconds:
            best, gained = count, tokens - step.tokens
            best_tokens, best_seconds = tokens, seconds
    return best, gained


def nodes_that_pay(trees: Sequence[Sequence[float]], step: StepPrice) -> tuple[list[list[int]], float]:
    """For each tree the nodes that pay for themselves, over the whole batch, and how many of all will be accepted.

    trees: the confidences of each tree's nodes, estimates of their path probabilities. Nodes: rising, with the root,
    themselves a tree: no child is surer than its parent, so that the most probable nodes of a tree are one. Not for
    trees with sampled children: what is kept of a draw must not depend on what was drawn.
    """
    flat = [confidence for own in trees for confidence in own[1:]]
    # Stable: of equally probable nodes of a tree the one that stands first comes first, a parent before its child.
    order = sorted(range(len(flat)), key=flat.__getitem__, reverse=True)
    count, gained = best_prefix(step, [math.exp(flat[place]) for place in order])
    kept = sorted(order[:count])
    nodes: list[list[int]] = []
    start = used = 0
    for own in trees:
        end = start + len(own) - 1
        first = used
        while used < count and kept[used] < end:
            used += 1
        nodes.append([0, *[place - start + 1 for place in kept[first:used]]])
        start = end
    return nodes, gained
