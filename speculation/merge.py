"""Several candidate trees made one (SpecInfer, section 3, definitions 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speculation.tree import InvalidTree, TokenTree


@dataclass(frozen=True, eq=False)
class MergedDraft:
    """What the LLM checks, and what it was merged from.

    tree: the union of the root paths of all components, depth-first.
    components: the trees that were merged; multi-step speculative sampling tests each one's draws on their own.
    maps: maps[c][i] is the node of `tree` for node i of components[c], or -1 where max_nodes cut it.
    """

    tree: TokenTree
    components: tuple[TokenTree, ...]
    maps: tuple[tuple[int, ...], ...]

    @classmethod
    def single(cls, tree: TokenTree) -> MergedDraft:
        """The draft of one tree."""
        order = tree.subtree_order()
        new = {old: index for index, old in enumerate(order)}
        return cls(tree.select(order), (tree,), (tuple(new[old] for old in range(len(tree))),))


@dataclass
class _Union:
    """Trees being merged. Node lists are indexed by merged node, in the order in which the nodes were first met."""

    token_ids: list[int]
    parents: list[int]
    # Components that contain the node; and its best rank: the sum over its path of 1 + place among its siblings.
    votes: list[int]
    ranks: list[int]
    nodes: dict[tuple[int, int], int]

    def add(self, tree: TokenTree) -> list[int]:
        """Merged node of each node of the tree."""
        mapping = [0]
        ranks = [0] * len(tree)
        siblings = [0] * len(tree)
        self.votes[0] += 1
        for node, parent in enumerate(tree.parents[1:], start=1):
            siblings[parent] += 1
            ranks[node] = ranks[parent] + siblings[parent]
            edge = (mapping[parent], tree.token_ids[node])
            merged = self.nodes.setdefault(edge, len(self.token_ids))
            if merged == len(self.token_ids):
                self.token_ids.append(edge[1])
                self.parents.append(edge[0])
                self.votes.append(0)
                self.ranks.append(ranks[node])
            self.votes[merged] += 1
            self.ranks[merged] = min(self.ranks[merged], ranks[node])
            mapping.append(merged)
        return mapping

    def best(self, max_nodes: int) -> list[int]:
        """The root and the max_nodes most promising other nodes, in order.

        A child has fewer or as many votes as its parent and a larger rank, hence comes after it: parents are kept.
        """
        promising = sorted(range(1, len(self.token_ids)), key=lambda node: (self.ranks[node] - self.votes[node], node))
        return [0, *sorted(promising[:max_nodes])]


def merge_trees(trees: Sequence[TokenTree], max_nodes: int | None = None) -> MergedDraft:
    """The union of the root paths of the trees; the first tree's children stand first.

    max_nodes: upper bound of the merged nodes, the root not counted. Trees without distributions lose the nodes that
        few trees propose and that stand far down or late among their siblings. Trees with sampled children lose whole
        levels, counted before duplicates are merged: the number of draws of a level does not depend on what was drawn
        there, so that multi-step speculative sampling stays unbiased.

    Raises:
        InvalidTree: no tree is given, the roots differ, or the union is larger than a tree may be.
    """
    if not trees:
        raise InvalidTree("no tree to merge; give TokenTree.root_only(last token) for an empty draft")
    roots = {tree.token_ids[0] for tree in trees}
    if len(roots) > 1:
        raise InvalidTree(f"the trees have different roots {sorted(roots)}; they are drafts for different sequences")
    if max_nodes is not None and max_nodes < 0:
        raise ValueError(f"max_nodes is {max_nodes}; it must be at least 0")
    if len(trees) == 1 and (max_nodes is None or len(trees[0]) <= max_nodes + 1):
        return MergedDraft.single(trees[0])
    if max_nodes is not None and any(tree.distributions for tree in trees):
        trees = _cut_levels(trees, max_nodes)
    union = _Union(token_ids=[trees[0].token_ids[0]], parents=[-1], votes=[0], ranks=[0], nodes={})
    mappings = [union.add(tree) for tree in trees]
    kept = list(range(len(union.token_ids))) if max_nodes is None else union.best(max_nodes)
    new = {old: index for index, old in enumerate(kept)}
    tree = TokenTree(
        tuple(union.token_ids[old] for old in kept),
        tuple(-1 if old == 0 else new[union.parents[old]] for old in kept),
        source="+".join(dict.fromkeys(tree.source for tree in trees if tree.source)),
    )
    order = tree.subtree_order()
    final = {kept[index]: position for position, index in enumerate(order)}
    maps = tuple(tuple(final.get(old, -1) for old in mapping) for mapping in mappings)
    return MergedDraft(tree.select(order), tuple(trees), maps)


def _cut_levels(trees: Sequence[TokenTree], max_nodes: int) -> list[TokenTree]:
    """The trees without the levels from which on they have more than max_nodes nodes together."""
    depths = [tree.depths() for tree in trees]
    total = 0
    for level in range(1, max(map(max, depths)) + 1):
        total += sum(depth.count(level) for depth in depths)
        if total > max_nodes:
            return [
                tree.select([node for node, depth in enumerate(node_depths) if depth < level])
                for tree, node_depths in zip(trees, depths, strict=True)
            ]
    return list(trees)
