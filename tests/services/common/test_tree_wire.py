from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import tree_pb2
from services.common.tree_wire import trees_from_wire, trees_to_wire
from speculation.tree import InvalidTree, TokenTree
from tests.speculation.trees import confident_trees, token_trees

VOCAB = 5


def sent(trees: Sequence[TokenTree]) -> list[TokenTree]:
    return trees_from_wire(tree_pb2.TokenTrees.FromString(trees_to_wire(trees).SerializeToString()), VOCAB)


def sampled(tree: TokenTree) -> TokenTree:
    q = torch.arange(1.0, VOCAB + 1) / (VOCAB * (VOCAB + 1) / 2)
    distributions = {node: q.roll(node) for node in tree.parents[1:]}
    return TokenTree(tree.token_ids, tree.parents, distributions, tree.source, tree.confidences)


trees = token_trees(VOCAB, source="a") | confident_trees(VOCAB, source="b")


@given(st.lists(trees | trees.map(sampled), max_size=5))
def test_round_trip(trees: list[TokenTree]) -> None:
    for tree, received in zip(trees, sent(trees), strict=True):
        assert (received.token_ids, received.parents, received.source) == (tree.token_ids, tree.parents, tree.source)
        assert received.confidences == tuple(torch.tensor(tree.confidences, dtype=torch.float32).tolist())
        assert received.distributions.keys() == tree.distributions.keys()
        for node, distribution in received.distributions.items():
            assert torch.equal(distribution, tree.distributions[node])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda message: message.sizes.pop(), "2 sizes, 3 sources and 3 marks of estimates"),
        (lambda message: message.sources.append("more"), "3 sizes, 4 sources"),
        (lambda message: message.estimated.pop(), "3 sources and 2 marks of estimates"),
        (lambda message: message.sizes.__setitem__(1, 4), "6 tokens and 6 parents for trees of 7 nodes"),
        (lambda message: message.token_ids.pop(), "5 tokens and 6 parents for trees of 6 nodes"),
        (lambda message: message.parents.append(0), "6 tokens and 7 parents for trees of 6 nodes"),
        (lambda message: message.confidences.pop(), "5 confidences for 6 nodes"),
        (lambda message: message.confidences.append(-9.0), "7 confidences for 6 nodes"),
        (lambda message: message.estimated.__setitem__(1, False), "6 confidences for 3 nodes"),
        (lambda message: message.confidences.__setitem__(2, 0.25), "node 0 has confidence 0.25"),
        (lambda message: message.confidences.__setitem__(4, -0.25), "node 2 has confidence -0.25; .* at most -0.5"),
        (lambda message: message.confidences.__setitem__(3, float("nan")), "node 1 has confidence nan"),
        (lambda message: message.confidences.__setitem__(2, float("nan")), "node 0 has confidence nan"),
        (lambda message: message.confidences.__setitem__(4, -float("inf")), "node 2 has confidence -inf"),
        (lambda message: message.parents.__setitem__(3, 2), "node 1 has parent 2"),
        (lambda message: message.parents.__setitem__(3, -1), "node 1 has parent -1"),
        (lambda message: message.parents.__setitem__(3, -2), "node 1 has parent -2"),
        (lambda message: message.parents.__setitem__(2, 0), "the root's parent is 0"),
        (lambda message: message.token_ids.__setitem__(4, VOCAB), "node 2 has token 5"),
        (lambda message: (message.parents.__setitem__(4, 0), message.token_ids.__setitem__(4, 2)), "repeats token 2"),
        (lambda message: message.sampled_nodes.append(0), "0 bytes of distributions"),
        (lambda message: sample(message, [6]), r"sampled nodes \[6\]"),
        (lambda message: sample(message, [3, 3]), r"sampled nodes \[3, 3\]"),
        (lambda message: sample(message, [3], 0.9), "does not sum to 1"),
    ],
)
def test_broken_trees_are_refused(spoil: Callable[[tree_pb2.TokenTrees], object], message: str) -> None:
    """The second tree of three is spoilt, which stands behind two nodes."""
    around = TokenTree((1, 2), (-1, 0), confidences=(0.0, -1.0))
    last = TokenTree((3,), (-1,), confidences=(0.0,))
    wire = trees_to_wire([around, TokenTree((1, 2, 3), (-1, 0, 1), confidences=(0.0, -0.5, -1.0)), last])
    assert [len(tree) for tree in trees_from_wire(wire, VOCAB)] == [2, 3, 1]
    spoil(wire)
    with pytest.raises(InvalidTree, match=message):
        trees_from_wire(wire, VOCAB)


def sample(message: tree_pb2.TokenTrees, nodes: Sequence[int], total: float = 1.0) -> None:
    message.sampled_nodes.extend(nodes)
    message.distributions = torch.full((len(nodes), VOCAB), total / VOCAB).numpy().tobytes()
