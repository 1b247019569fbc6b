"""Several candidate trees made one (SpecInfer, section 3, definitions 3.1 and 3.2), by calibrated probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from speculation.tree import MAX_NODES, InvalidTree, TokenTree


@dataclass(frozen=True, eq=False)
class MergedDraft:
    """What the LLM checks, and what it was merged from.

    tree: the union of the root paths of all components, depth-first, with merged confidences. Siblings stand in the
        order of falling confidence; where a component was sampled, in the order in which they were first met. A draft
        of one whole tree keeps that tree's own order.
    components: the trees that were merged; multi-step speculative sampling tests each one's draws on their own.
    maps: maps[c][i] is the node of `tree` for node i of components[c], or -1 where max_nodes cut it.
    """

    tree: TokenTree
    components: tuple[TokenTree, ...]
    maps: tuple[tuple[int, ...], ...]

    @classmethod
    def root_only(cls, token_id: int) -> MergedDraft:
        """The draft of plain decoding."""
        tree = TokenTree.root_only(token_id)
        return cls(tree, (tree,), ((0,),))

    @classmethod
    def single(
        cls, tree: TokenTree, nodes: Sequence[int] | None = None, confidences: Sequence[float] | None = None
    ) -> MergedDraft:
        """The draft of one tree, as it is but for the order of its nodes.

        nodes: those that are kept, rising, with the root and every node's parent; None for all.
        confidences: of all nodes of the tree, instead of its own.
        """
        order = tree.subtree_order(nodes)
        new = {old: index for index, old in enumerate(order)}
        own = None if confidences is None else tuple([confidences[old] for old in order])
        return cls(tree.select(order, own), (tree,), (tuple([new.get(old, -1) for old in range(len(tree))]),))

    def keep(self, nodes: Sequence[int], confidences: Sequence[float]) -> MergedDraft:
        """The draft with these nodes of its tree alone, which must be rising, hold the root and every node's parent.

        confidences: of all nodes of its tree, instead of the tree's own.

        Raises:
            InvalidTree: the root or a parent is missing.
        """
        tree = self.tree.select(nodes, tuple([confidences[node] for node in nodes]))
        if len(nodes) == len(self.tree):
            return MergedDraft(tree, self.components, self.maps)
        new = {old: index for index, old in enumerate(nodes)}
        maps = tuple(tuple([new.get(node, -1) for node in mapping]) for mapping in self.maps)
        return MergedDraft(tree, self.components, maps)


class _Union:
    """Trees being merged. Lists are indexed by merged node, in the order in which the nodes were first met.

    A node's confidence is the noisy-or of those of the n components that have it, as if their guesses were independent:
        c = log(1 - (1 - p_1) (1 - p_2) .. (1 - p_n))
    It never rises along a path: the components that have a child have its parent too, and no p_i of the child is above
    that of the parent, so that the parent's product has all the factors of the child's, none larger, and perhaps more
    factors below one.
    """

    def __init__(self, tree: TokenTree, confidences: Sequence[float]) -> None:
        """Begins with the nodes of a tree, each at its own place."""
        self.token_ids = list(tree.token_ids)
        self.parents = list(tree.parents)
        self.confidences = list(confidences)
        self._nodes = dict(zip(zip(tree.parents, tree.token_ids, strict=True), range(len(tree)), strict=True))

    def add(self, tree: TokenTree, confidences: Sequence[float]) -> list[int]:
        """Merged node of each node of another tree."""
        mapping = [0]
        for token_id, parent, confidence in zip(tree.token_ids[1:], tree.parents[1:], confidences[1:], strict=True):
            above = mapping[parent]
            merged = self._nodes.setdefault((above, token_id), len(self.token_ids))
            if merged == len(self.token_ids):
                self.token_ids.append(token_id)
                self.parents.append(above)
                self.confidences.append(confidence)
            else:
                # Rounding must not make a child surer than its parent.
                either = _either(self.confidences[merged], confidence)
                self.confidences[merged] = min(either, self.confidences[above])
            mapping.append(merged)
        return mapping

    def depth_first(self, max_nodes: int | None, by_confidence: bool) -> list[int]:
        """The root and the max_nodes most probable other nodes (None: all), every subtree in consecutive places.

        by_confidence: siblings in the order of falling confidence, else in the order in which they were first met.
        """
        # Stable, so that of equally probable nodes the one first met comes first: a parent before its child, hence
        # the parents of all kept nodes are kept.
        kept = sorted(range(len(self.token_ids)), key=self.confidences.__getitem__, reverse=True)
        if max_nodes is not None:
            del kept[max_nodes + 1 :]
        if not by_confidence:
            kept.sort()
        children: list[list[int]] = [[] for _ in self.token_ids]
        for node in reversed(kept[1:]):
            children[self.parents[node]].append(node)
        order: list[int] = []
        stack = [0]
        while stack:
            node = stack.pop()
            order.append(node)
            stack += children[node]
        return order


def merge_trees(
    trees: Sequence[TokenTree],
    max_nodes: int | None = None,
    confidences: Sequence[Sequence[float]] | None = None,
) -> MergedDraft:
    """The union of the root paths of the trees.

    max_nodes: upper bound of the merged nodes, the root not counted. Trees without distributions keep the most probable
        nodes of the union. Trees with sampled children lose whole levels, counted before duplicates are merged: the
        number of draws of a level does not depend on what was drawn there, so that multi-step speculative sampling
        stays unbiased.
    confidences: of each tree without distributions, instead of its own; none above that of its parent.

    A tree without confidences counts with 2^-(sum over a node's path of 1 + place among its siblings).

    Raises:
        InvalidTree: no tree is given, the roots differ, or the union is larger than a tree may be.
    """
    check_mergeable(trees)
    if max_nodes is not None and max_nodes < 0:
        raise ValueError(f"max_nodes is {max_nodes}; it must be at least 0")
    if confidences is None and _is_merged(trees, max_nodes):
        return MergedDraft.single(trees[0])
    sampled = any(tree.distributions for tree in trees)
    if max_nodes is not None and sampled:
        trees = _cut_levels(trees, max_nodes)
    if confidences is None:
        confidences = [tree.confidences or _rank_confidences(tree) for tree in trees]
    union = _Union(trees[0], confidences[0])
    mappings: list[Sequence[int]] = [range(len(trees[0]))]
    mappings += [union.add(tree, own) for tree, own in zip(trees[1:], confidences[1:], strict=True)]
    order = union.depth_first(max_nodes, by_confidence=not sampled)
    check_size(order)
    final = [-1] * len(union.token_ids)
    for index, old in enumerate(order):
        final[old] = index
    tree = TokenTree.of_sound_parts(
        tuple([union.token_ids[old] for old in order]),
        (-1, *[final[union.parents[old]] for old in order[1:]]),
        {},
        merged_source(trees),
        tuple([union.confidences[old] for old in order]),
    )
    return MergedDraft(tree, tuple(trees), tuple(tuple([final[old] for old in mapping]) for mapping in mappings))


def _is_merged(trees: Sequence[TokenTree], max_nodes: int | None) -> bool:
    """Whether it is one tree that may stay as it is."""
    return len(trees) == 1 and bool(trees[0].confidences) and (max_nodes is None or len(trees[0]) <= max_nodes + 1)


def merged_source(trees: Sequence[TokenTree]) -> str:
    """The name of what trees were merged of."""
    return _joined(tuple([tree.source for tree in trees]))


@lru_cache(maxsize=64)
def _joined(sources: Sequence[str]) -> str:
    return "+".join(dict.fromkeys(filter(None, sources)))


def check_size(nodes: Sequence[int]) -> None:
    """Raises InvalidTree: a union has more nodes than a tree may have."""
    if len(nodes) > MAX_NODES:
        raise InvalidTree(f"the union of the trees has {len(nodes)} nodes; a tree has 1 to {MAX_NODES}")


def check_mergeable(trees: Sequence[TokenTree]) -> None:
    """Raises InvalidTree: there is no tree, or their roots differ."""
    if not trees:
        raise InvalidTree("no tree to merge; give TokenTree.root_only(last token) for an empty draft")
    root = trees[0].token_ids[0]
    if any(tree.token_ids[0] != root for tree in trees):
        roots = sorted({tree.token_ids[0] for tree in trees})
        raise InvalidTree(f"the trees have different roots {roots}; they are drafts for different sequences")


def _either(a: float, b: float) -> float:
    """log(p + q - p q) for a = log p and b = log q, of which neither is above 0; never below either of them."""
    high, low = (a, b) if a >= b else (b, a)
    # p + q - p q = p (1 + (1 - p) q / p): no term cancels or overflows, whatever underflows
    return high + math.log1p(-math.expm1(high) * math.exp(low - high))


def _rank_confidences(tree: TokenTree) -> list[float]:
    """Confidences of a tree that has none: each child is half as likely as the sibling before it, the first 1/2."""
    confidences = [0.0] * len(tree)
    siblings = [0] * len(tree)
    for node, parent in enumerate(tree.parents[1:], start=1):
        siblings[parent] += 1
        confidences[node] = confidences[parent] - siblings[parent] * math.log(2)
    return confidences


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
