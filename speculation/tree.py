"""The token tree: the one shape of everything that the LLM is asked to check.

A prompt is a chain, plain decoding is a tree of one node, a draft is a tree.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

MAX_NODES = 256


class InvalidTree(ValueError):
    """A tree that breaks an invariant; the message says which one, and where."""


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Candidate tokens behind a sequence (SpecInfer, section 2).

    Node 0 is the root: the last token that the sequence already has, whose key and value are not computed yet.

    token_ids: token of each node.
    parents: parents[0] == -1 and 0 <= parents[i] < i. Children of a node stand in the order of the draft: most likely
        first or, when they were sampled, in the order in which they were drawn.
    distributions: float32 [vocab] for every node whose children were sampled: the distribution that the first of them
        was drawn from; each later one was drawn from the same without those before it. Empty for other trees.
    source: name of the draft source, for metrics.
    confidences: log of the draft's estimate of the probability that each node is accepted; 0 for the root, and never
        above the parent's. Empty when the draft makes no estimate.

    Raises:
        InvalidTree: sizes differ, the tree is empty or has over MAX_NODES nodes, a parent does not stand before its
            child, two children of a node are the same token, or a confidence is above its parent's or infinite.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    distributions: dict[int, torch.Tensor] = field(default_factory=dict)
    source: str = ""
    confidences: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not are_sound((len(self.token_ids),), self.token_ids, self.parents, self.confidences):
            raise InvalidTree(self._unsoundness())
        if self.distributions and (strangers := [node for node in self.distributions if not 0 <= node < len(self)]):
            raise InvalidTree(f"distributions for nodes {strangers} of a tree of {len(self)}")

    def _unsoundness(self) -> str:
        """What is wrong with a tree that `are_sound` refuses."""
        size = len(self.token_ids)
        if size != len(self.parents):
            return f"{size} tokens but {len(self.parents)} parents"
        if not 1 <= size <= MAX_NODES:
            return f"{size} nodes; a tree has 1 to {MAX_NODES}"
        if self.parents[0] != -1:
            return f"the root's parent is {self.parents[0]}, not -1"
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                return f"node {node} has parent {parent}; it must be in 0..{node - 1}"
        edges = list(zip(self.parents, self.token_ids, strict=True))
        for node, edge in enumerate(edges):
            if edge in edges[:node]:
                return f"node {node} repeats token {edge[1]} below node {edge[0]}"
        return self._confidence_unsoundness()

    def __len__(self) -> int:
        return len(self.token_ids)

    def _confidence_unsoundness(self) -> str:
        """What is wrong with the confidences of a tree whose nodes are sound; empty when nothing is."""
        confidences = self.confidences
        if len(confidences) != len(self):
            return f"{len(confidences)} confidences for {len(self)} nodes"
        for node, confidence in enumerate(confidences):
            most = confidences[self.parents[node]] if node else 0.0
            if not -math.inf < confidence <= most:
                return f"node {node} has confidence {confidence}; it must be finite and at most {most}"
        return ""

    @classmethod
    def root_only(cls, token_id: int) -> TokenTree:
        """The tree of plain decoding."""
        return cls.of_sound_parts((token_id,), (-1,), {}, "", ())

    @classmethod
    def of_sound_parts(
        cls,
        token_ids: tuple[int, ...],
        parents: tuple[int, ...],
        distributions: dict[int, torch.Tensor],
        source: str,
        confidences: tuple[float, ...],
    ) -> TokenTree:
        """A tree that is sound by the way in which it was made: it is not checked, which a small model's step feels."""
        tree = cls.__new__(cls)
        vars(tree).update(
            token_ids=token_ids, parents=parents, distributions=distributions, source=source, confidences=confidences
        )
        return tree

    def with_confidences(self, confidences: tuple[float, ...]) -> TokenTree:
        """The same tree with other confidences.

        Raises:
            InvalidTree: one of them is above its parent's or infinite.
        """
        tree = TokenTree.of_sound_parts(self.token_ids, self.parents, self.distributions, self.source, confidences)
        if confidences and (unsoundness := tree._confidence_unsoundness()):
            raise InvalidTree(unsoundness)
        return tree

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check what came over the wire against the vocabulary.

        Raises:
            InvalidTree: a token id outside 0..vocab_size-1, a distribution of another length or that is none
                (negative, not finite, not of sum 1), or a child to which its parent's distribution gives no chance.
        """
        for node, token_id in enumerate(self.token_ids):
            if not 0 <= token_id < vocab_size:
                raise InvalidTree(f"node {node} has token {token_id}; the vocabulary has {vocab_size}")
        for node, distribution in self.distributions.items():
            if distribution.shape != (vocab_size,):
                raise InvalidTree(
                    f"distribution of node {node} has shape {tuple(distribution.shape)}, not ({vocab_size},)"
                )
            if not (abs(float(distribution.sum(dtype=torch.float64)) - 1) < 1e-3 and float(distribution.min()) >= 0):
                raise InvalidTree(
                    f"distribution of node {node} has negative or infinite entries, or a sum other than 1"
                )
        for node, parent in enumerate(self.parents[1:], start=1):
            q = self.distributions.get(parent)
            if q is not None and not q[self.token_ids[node]] > 0:
                raise InvalidTree(f"node {node} has token {self.token_ids[node]}, which its parent cannot have drawn")

    def depths(self) -> list[int]:
        """Depth of each node; the root's is 0."""
        depths = [0] * len(self)
        for node in range(1, len(self)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    def children(self) -> list[list[int]]:
        """Children of each node, in the order of the draft."""
        children: list[list[int]] = [[] for _ in self.token_ids]
        for node in range(1, len(self)):
            children[self.parents[node]].append(node)
        return children

    def path(self, node: int) -> list[int]:
        """Nodes from below the root down to `node`; empty for the root."""
        path: list[int] = []
        while node > 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def ancestor_masks(self) -> list[int]:
        """The topology-aware causal mask (SpecInfer, section 4.2): bit j of mask i is set when i sees j.

        A node sees its ancestors and itself.
        """
        masks: list[int] = [1] * len(self)
        for node in range(1, len(self)):
            masks[node] = masks[self.parents[node]] | 1 << node
        return masks

    def subtree_order(self, nodes: Iterable[int] | None = None) -> list[int]:
        """Nodes in depth-first order; siblings stay in the order of the draft.

        nodes: which of them, rising, with the root and every node's parent; None for all.
        """
        children: dict[int, list[int]] = {}
        for node in range(len(self)) if nodes is None else nodes:
            children.setdefault(self.parents[node], []).append(node)
        order: list[int] = []
        stack = [0]
        while stack:
            node = stack.pop()
            order.append(node)
            if (below := children.get(node)) is not None:
                stack += reversed(below)
        return order

    def depth_first(self) -> TokenTree:
        """The same tree with every subtree in consecutive nodes; the order of siblings stays."""
        return self.select(self.subtree_order())

    def select(self, nodes: Sequence[int], confidences: tuple[float, ...] | None = None) -> TokenTree:
        """The tree of these nodes, numbered in the order given: node nodes[i] becomes node i.

        A selected node's parent must be selected before it. A distribution whose node loses all its children is
        dropped.

        confidences: of the selected nodes, instead of the tree's own.

        Raises:
            InvalidTree: the first node is not the root, a node stands twice, or a parent is missing; one of the
                confidences given is above its parent's or infinite.
        """
        if len(nodes) == len(self) and all(new == old for new, old in enumerate(nodes)):
            return self if confidences is None else self.with_confidences(confidences)
        if not nodes or nodes[0] != 0:
            raise InvalidTree(f"the selected nodes {list(nodes[:4])}.. do not begin with the root")
        new = {old: index for index, old in enumerate(nodes)}
        try:
            parents = (-1, *(new[self.parents[old]] for old in nodes[1:]))
        except KeyError as missing:
            raise InvalidTree(f"node {missing} is not selected, but one of its children is") from None
        if len(new) < len(nodes) or any(map(operator.ge, parents, range(len(nodes)))):
            raise InvalidTree(f"of the selected nodes {list(nodes)} one stands twice, or before its parent")
        own = tuple([self.confidences[old] for old in nodes]) if confidences is None and self.confidences else ()
        inner = set(parents)
        distributions = {new[old]: q for old, q in self.distributions.items() if new.get(old) in inner}
        tree = TokenTree.of_sound_parts(
            tuple([self.token_ids[old] for old in nodes]), parents, distributions, self.source, own
        )
        return tree.with_confidences(confidences) if confidences else tree


def are_sound(
    sizes: Sequence[int], token_ids: Sequence[int], parents: Sequence[int], confidences: Sequence[float]
) -> bool:
    """Whether trees, the nodes of one behind those of the other, keep the invariants of TokenTree: at once for all.

    sizes: of each tree. confidences: of all trees or of none.
    """
    if not (sizes and min(sizes) >= 1 and max(sizes) <= MAX_NODES and sum(sizes) == len(token_ids) == len(parents)):
        return False
    numbers = list(chain.from_iterable(map(range, sizes)))  # each node's in its own tree
    # Each parent is below its node's number, and none below -1: roots have -1, and since no more have it, roots alone.
    if not (min(parents) == -1 and parents.count(-1) == len(sizes) and all(map(operator.lt, parents, numbers))):
        return False
    # The place of each node's parent; a root gets the last place of the tree before it, which has no children.
    above = list(map(operator.add, parents, map(operator.sub, range(len(parents)), numbers)))
    if len(set(zip(above, token_ids, strict=True))) < len(token_ids):
        return False
    if not confidences:
        return True
    if len(confidences) != len(token_ids) or not min(confidences) > -math.inf:
        return False
    most = [0.0 if parent < 0 else confidences[place] for parent, place in zip(parents, above, strict=True)]
    return all(map(operator.le, confidences, most))  # NaN is in no order
