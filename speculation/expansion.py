"""Growing a candidate tree from a small model's own next-token distributions.

A builder says which nodes it wants to know the next token of, is given the log-probabilities, and asks again, level by
level; so one forward pass can serve the frontiers of many sequences. Builders run no model and know none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speculation.children import ChildPolicy, ChildSelection, rank_children
from speculation.tree import MAX_NODES, TokenTree

__all__ = ["BestFirstExpansion", "ChildPolicy", "ChildSelection", "Expansion", "Slots", "StaticExpansion"]


@dataclass(frozen=True)
class Slots:
    """Where the KV of a draft stands: entry number j behind the committed ones is that of token_ids[j].

    parents: slot of each one's parent, which stands before it; -1 for the root, which is slot 0. No two children of a
        node have the same token.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Slots on the path of the accepted tokens, from the root's on; empty when nothing was evaluated.

        They hold the KV of the root, token_ids[0], token_ids[1] and so on, as far as the path was evaluated.
        """
        if not self.token_ids:
            return []
        matched = [0]
        for token_id in token_ids:
            edge = (matched[-1], token_id)
            for slot in range(matched[-1] + 1, len(self.token_ids)):
                if (self.parents[slot], self.token_ids[slot]) == edge:
                    matched.append(slot)
                    break
            else:
                break
        return matched


class Expansion(ABC):
    """A tree under construction. Nodes are numbered in the order in which they were added; 0 is the root.

    root_token: the last token that the sequence has. position: index in the sequence of the token behind it.
    max_nodes: upper bound of the built tree's nodes, the root not counted.
    min_confidence: nodes with a smaller probability of being accepted, by the builder's estimate, get no children.

    Raises:
        ValueError: max_nodes or min_confidence outside its bounds.
    """

    def __init__(
        self,
        root_token: int,
        position: int,
        policy: ChildPolicy,
        *,
        max_nodes: int,
        min_confidence: float = 0.0,
        source: str = "",
    ) -> None:
        if not 0 <= max_nodes < MAX_NODES:
            raise ValueError(f"max_nodes is {max_nodes}; it must be in 0..{MAX_NODES - 1}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence is {min_confidence}; it must be in 0..1")
        self.token_ids = [root_token]
        # Nodes whose log-probabilities were given, in that order: slot j of the draft's KV holds evaluated[j].
        self.evaluated: list[int] = []
        self._position = position
        self._policy = policy
        self._max_nodes = max_nodes
        self._floor = math.log(min_confidence) if min_confidence > 0 else -math.inf
        self._source = source
        self._parents = [-1]
        self._depths = [0]
        # Log of the estimated probability that the node is accepted; never above its parent's.
        self._confidences = [0.0]
        self._distributions: dict[int, torch.Tensor] = {}
        # For evaluated nodes: bit j is set when slot j is the node's own or an ancestor's.
        self._masks: dict[int, int] = {}
        self._frontier = [0] if max_nodes > 0 and self._level_width(0) > 0 else []

    def frontier(self) -> list[int]:
        """Nodes whose next-token log-probabilities are wanted now, all of one depth; empty when the tree is done."""
        return self._frontier

    def frontier_masks(self) -> list[int]:
        """Ancestor bit mask of each frontier node over the slots; the i-th of them will get slot len(evaluated) + i."""
        first = len(self.evaluated)
        ancestors = [self._masks.get(self._parents[node], 0) for node in self._frontier]
        return [mask | 1 << first + index for index, mask in enumerate(ancestors)]

    def rank(self, log_probs: torch.Tensor) -> torch.Tensor:
        """What `extend` wants to know of the frontier's distributions, on their device: see rank_children.

        log_probs: float32 [len(frontier), vocab], row for row the distribution behind the frontier's nodes as
            LogitsPipeline.draft_log_probs gives it.

        Raises:
            ValueError: another number of rows.
        """
        frontier = self._frontier
        if log_probs.dim() != 2 or len(log_probs) != len(frontier) or not frontier:
            raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}; the frontier has {len(frontier)} nodes")
        depth = self._depths[frontier[0]]
        width = min(self._level_width(depth), log_probs.shape[1])
        return rank_children(self._policy, log_probs, self._position + depth, width)

    def extend(self, log_probs: torch.Tensor, ranking: torch.Tensor | None = None) -> None:
        """Add the children of the frontier.

        log_probs: as for `rank`. ranking: what `rank` gave for them, on the host; None to have it computed here, which
            costs a copy from the device for each tree.
        """
        ranking = self.rank(log_probs) if ranking is None else ranking
        token_ids, confidences = ranking.tolist()
        frontier = self._frontier
        for node, mask in zip(frontier, self.frontier_masks(), strict=True):
            self._masks[node] = mask
        self.evaluated.extend(frontier)
        depth = self._depths[frontier[0]]
        # Rounding must not make a child surer than its parent.
        scores = [
            [self._confidences[node] + min(confidence, 0.0) for confidence in row if confidence > -math.inf]
            for node, row in zip(frontier, confidences, strict=True)
        ]
        first = len(self.token_ids)
        for row, count in enumerate(self._share(depth, scores)):
            if count and self._policy.selection is ChildSelection.SAMPLED:
                self._distributions[frontier[row]] = log_probs[row].exp()
            self.token_ids.extend(map(int, token_ids[row][:count]))
            self._confidences.extend(scores[row][:count])
            self._parents.extend([frontier[row]] * count)
        added = range(first, len(self.token_ids))
        self._depths.extend([depth + 1] * len(added))
        promising = [node for node in added if self._confidences[node] >= self._floor]
        self._frontier = self._expandable(promising) if self._level_width(depth + 1) > 0 else []

    def build(self) -> TokenTree:
        """The tree so far, depth-first; at any time."""
        kept = self._kept()
        new = {old: index for index, old in enumerate(kept)}
        return TokenTree(
            tuple(self.token_ids[old] for old in kept),
            (-1, *(new[self._parents[old]] for old in kept[1:])),
            {new[old]: distribution for old, distribution in self._distributions.items()},
            self._source,
            tuple(self._confidences[old] for old in kept),
        ).depth_first()

    def depth(self, node: int) -> int:
        """Depth of a node; the root's is 0."""
        return self._depths[node]

    def confidence(self, node: int) -> float:
        """The builder's estimate of the probability that the node is accepted, in (0, 1]."""
        return math.exp(self._confidences[node])

    def path_tokens(self, node: int) -> tuple[int, ...]:
        """Tokens from below the root down to the node; empty for the root."""
        token_ids: list[int] = []
        while node > 0:
            token_ids.append(self.token_ids[node])
            node = self._parents[node]
        return tuple(reversed(token_ids))

    def slots(self) -> Slots:
        """The evaluated nodes."""
        slot_of = {node: slot for slot, node in enumerate(self.evaluated)}
        token_ids = [self.token_ids[node] for node in self.evaluated]
        return Slots(token_ids, [slot_of.get(self._parents[node], -1) for node in self.evaluated])

    @abstractmethod
    def _level_width(self, depth: int) -> int:
        """How many children a node of this depth may have at most; 0 ends the growth."""

    @abstractmethod
    def _share(self, depth: int, scores: Sequence[Sequence[float]]) -> list[int]:
        """How many children each frontier node gets, of those that scores lists for it, best first.

        Nothing that was drawn may enter here but the path to the nodes: multi-step speculative sampling is exact only
        if the number of draws is fixed before them and every draw is handed on.
        """

    @abstractmethod
    def _expandable(self, nodes: list[int]) -> list[int]:
        """Those of the level just added that shall get children."""

    @abstractmethod
    def _kept(self) -> list[int]:
        """Nodes of the built tree, in order, with the root."""


class StaticExpansion(Expansion):
    """The same shape for every draft: a node of depth i has widths[i] children (SpecInfer, section 3, <k1, k2, .. km>).

    When max_nodes cuts a level, first children come before second ones.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(
        self,
        root_token: int,
        position: int,
        policy: ChildPolicy,
        *,
        widths: Sequence[int],
        max_nodes: int,
        min_confidence: float = 0.0,
        source: str = "",
    ) -> None:
        if any(width < 1 for width in widths):
            raise ValueError(f"widths are {list(widths)}; each must be at least 1")
        self._widths = tuple(widths)
        super().__init__(
            root_token, position, policy, max_nodes=max_nodes, min_confidence=min_confidence, source=source
        )

    def _level_width(self, depth: int) -> int:
        return min(self._widths[depth], self._left()) if depth < len(self._widths) else 0

    def _left(self) -> int:
        return self._max_nodes + 1 - len(self.token_ids)

    def _share(self, depth: int, scores: Sequence[Sequence[float]]) -> list[int]:
        counts = [0] * len(scores)
        left = self._left()
        for rank in range(self._widths[depth]):
            for row, row_scores in enumerate(scores):
                if rank < len(row_scores) and left > 0:
                    counts[row] += 1
                    left -= 1
        return counts

    def _expandable(self, nodes: list[int]) -> list[int]:
        return nodes[: self._left()]

    def _kept(self) -> list[int]:
        return list(range(len(self.token_ids)))


class BestFirstExpansion(Expansion):
    """Grows where the small model is surest (as EAGLE-2, section 4): the tree of the max_nodes most probable paths.

    At each depth at most `beam` nodes are evaluated, the most probable ones that still belong to the best max_nodes. A
    child is never more probable than its parent, so that the best nodes form a tree.

    Sampled children cannot be pruned without bias. There the budget is spread over the levels, and a level's over its
    nodes, by confidences that depend on the path and on the distribution but not on the draws.

    Raises:
        ValueError: max_depth below 0 or beam below 1.
    """

    def __init__(
        self,
        root_token: int,
        position: int,
        policy: ChildPolicy,
        *,
        max_nodes: int,
        max_depth: int,
        beam: int = 8,
        min_confidence: float = 0.0,
        source: str = "",
    ) -> None:
        if max_depth < 0 or beam < 1:
            raise ValueError(f"max_depth is {max_depth} and beam {beam}; they must be at least 0 and 1")
        self._max_depth = max_depth
        self._beam = beam
        super().__init__(
            root_token, position, policy, max_nodes=max_nodes, min_confidence=min_confidence, source=source
        )

    def _level_width(self, depth: int) -> int:
        if depth >= self._max_depth:
            return 0
        if self._policy.selection is not ChildSelection.SAMPLED:
            return self._max_nodes
        left = self._max_nodes + 1 - len(self.token_ids)
        return math.ceil(left / (self._max_depth - depth))

    def _share(self, depth: int, scores: Sequence[Sequence[float]]) -> list[int]:
        ranked = sorted(((score, row) for row, row_scores in enumerate(scores) for score in row_scores), reverse=True)
        counts = [0] * len(scores)
        for _, row in ranked[: self._level_width(depth)]:
            counts[row] += 1
        return counts

    def _expandable(self, nodes: list[int]) -> list[int]:
        kept = set(self._kept())
        best = sorted((node for node in nodes if node in kept), key=self._confidences.__getitem__, reverse=True)
        return sorted(best[: self._beam])

    def _kept(self) -> list[int]:
        nodes = range(len(self.token_ids))
        if self._policy.selection is ChildSelection.SAMPLED:
            return list(nodes)
        # Stable: of equally probable nodes the one added first, hence a parent before its child.
        return sorted(sorted(nodes, key=self._confidences.__getitem__, reverse=True)[: self._max_nodes + 1])
