"""The trees that came for a sequence, made one, with the confidences that measured acceptance gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from kernels.native import native_available
from kernels.tree_merging.native import Merged, merge_drafts
from speculation.acceptance import Accepted
from speculation.experience import Reliability
from speculation.merge import MergedDraft, check_mergeable, check_size, merge_trees, merged_source
from speculation.tree import TokenTree


@dataclass
class Candidate:
    """What may be verified of one sequence's drafts, which choose their children without drawing.

    merged: of several trees, None for a single one. confidences: of the nodes of `tree`. deepest: level of all trees.
    nodes: what is kept of `tree`.
    """

    tree: TokenTree
    merged: MergedDraft | None
    confidences: Sequence[float]
    deepest: int
    nodes: Sequence[int] = field(default_factory=list)

    @classmethod
    def of(cls, trees: Sequence[TokenTree], most_nodes: int, reliability: Reliability) -> Candidate:
        """The estimates of each tree are corrected, and those of their union again."""
        deepest = max([max(tree.depths()) for tree in trees])
        if len(trees) == 1:
            return cls(trees[0], None, reliability.corrected(trees[0]), deepest)
        merged = merge_trees(trees, most_nodes, [reliability.corrected(tree) for tree in trees])
        return cls(merged.tree, merged, reliability.corrected(merged.tree), deepest)

    @classmethod
    def of_merged(cls, trees: Sequence[TokenTree], merged: Merged, source: str) -> Candidate:
        """The same, of what was merged natively. source: of the union."""
        if len(trees) == 1:
            return cls(trees[0], None, merged.corrected, merged.deepest)
        check_size(merged.token_ids)
        tree = TokenTree.of_sound_parts(merged.token_ids, merged.parents, {}, source, merged.confidences)
        return cls(tree, MergedDraft(tree, tuple(trees), merged.maps), merged.corrected, merged.deepest)

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


def make_candidates(
    found: Mapping[int, Sequence[TokenTree]], most_nodes: Mapping[int, int], reliability: Reliability
) -> dict[int, Candidate]:
    """A candidate of the trees of each sequence, by its id; several trees are merged in one native call if possible.

    Raises:
        InvalidTree: trees of a sequence have different roots, or more nodes together than a tree may have.
    """
    drafted = list(chain.from_iterable(found.values()))
    # A single tree is corrected sooner here than behind a native call.
    if len(drafted) == 1 or not native_available() or not all(tree.confidences for tree in drafted):
        return {key: Candidate.of(trees, most_nodes[key], reliability) for key, trees in found.items()}
    for trees in found.values():
        check_mergeable(trees)
    unions = [merged_source(trees) for trees in found.values()]
    numbers: dict[str, int] = {}
    tree_scales = [numbers.setdefault(tree.source, len(numbers)) for tree in drafted]
    union_scales = [numbers.setdefault(union, len(numbers)) for union in unions]
    scales = [reliability.scales(source) for source in numbers]
    bounds = [most_nodes[key] for key in found]
    merged = merge_drafts(list(found.values()), bounds, scales, tree_scales, union_scales)
    made = zip(found.items(), merged, unions, strict=True)
    return {key: Candidate.of_merged(trees, union, source) for (key, trees), union, source in made}
