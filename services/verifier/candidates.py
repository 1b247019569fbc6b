"""The trees that came for a sequence, made one, with the confidences that measured acceptance gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from speculation.acceptance import Accepted
from speculation.experience import Reliability
from speculation.merge import MergedDraft, merge_trees
from speculation.tree import TokenTree


@dataclass
class Candidate:
    """What may be verified of one sequence's drafts, which choose their children without drawing.

    merged: of several trees, None for a single one. confidences: of the nodes of `tree`. nodes: what is kept of them.
    """

    tree: TokenTree
    merged: MergedDraft | None
    confidences: Sequence[float]
    nodes: Sequence[int] = field(default_factory=list)

    @classmethod
    def of(cls, trees: Sequence[TokenTree], most_nodes: int, reliability: Reliability) -> Candidate:
        """The estimates of each tree are corrected, and those of their union again."""
        if len(trees) == 1:
            return cls(trees[0], None, reliability.corrected(trees[0]))
        merged = merge_trees(trees, most_nodes, [reliability.corrected(tree) for tree in trees])
        return cls(merged.tree, merged, reliability.corrected(merged.tree))

    @property
    def expected(self) -> float:
        """How many of all its nodes will be accepted."""
        return math.fsum([math.exp(confidence) for confidence in self.confidences[1:]])

    def keep(self, nodes: Sequence[int]) -> MergedDraft:
        """The draft of these nodes."""
        self.nodes = nodes
        if self.merged is None:
            return MergedDraft.single(self.tree, nodes, self.confidences)
        return self.merged.keep(nodes, self.confidences)

    def teach(self, reliability: Reliability, draft: MergedDraft, accepted: Accepted, memory: float) -> None:
        """What came of the kept nodes, for each source and for their union; then the confidences as they are by now."""
        path = set(accepted.nodes)
        for tree, nodes in zip(draft.components, draft.maps, strict=True):
            verified = [own for own, node in enumerate(nodes) if node >= 0]
            reliability.learn(tree, verified, {own for own in verified if nodes[own] in path}, memory)
        if self.merged is not None:
            reliability.learn(self.tree, self.nodes, {self.nodes[node] for node in path}, memory)
        self.confidences = reliability.corrected(self.tree)
