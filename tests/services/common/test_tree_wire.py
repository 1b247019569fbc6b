from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import tree_pb2
from services.common.tree_wire import tree_from_wire, tree_to_wire
from speculation.tree import InvalidTree, TokenTree
from tests.speculation.trees import confident_trees, token_trees

VOCAB = 5


def sent(tree: TokenTree) -> TokenTree:
    return tree_from_wire(tree_pb2.TokenTree.FromString(tree_to_wire(tree).SerializeToString()), VOCAB)


@given(token_trees(VOCAB, source="a") | confident_trees(VOCAB, source="b"), st.booleans())
def test_round_trip(tree: TokenTree, sampled: bool) -> None:
    if sampled:
        q = torch.full((VOCAB,), 1 / VOCAB)
        distributions = dict.fromkeys(tree.parents[1:], q)
        tree = TokenTree(tree.token_ids, tree.parents, distributions, tree.source, tree.confidences)
    received = sent(tree)
    assert (received.token_ids, received.parents, received.source) == (tree.token_ids, tree.parents, tree.source)
    assert received.confidences == tuple(torch.tensor(tree.confidences, dtype=torch.float32).tolist())
    assert received.distributions.keys() == tree.distributions.keys()
    for node, distribution in received.distributions.items():
        assert torch.equal(distribution, tree.distributions[node])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda message: message.confidences.pop(), "2 confidences for 3 nodes"),
        (lambda message: message.confidences.append(-9.0), "4 confidences for 3 nodes"),
        (lambda message: message.confidences.__setitem__(0, 0.25), "node 0 has confidence 0.25"),
        (lambda message: message.confidences.__setitem__(2, -0.25), "node 2 has confidence -0.25; .* at most -0.5"),
        (lambda message: message.confidences.__setitem__(1, float("nan")), "node 1 has confidence nan"),
        (lambda message: message.confidences.__setitem__(2, -float("inf")), "node 2 has confidence -inf"),
        (lambda message: message.parents.__setitem__(1, 2), "node 1 has parent 2"),
        (lambda message: message.token_ids.__setitem__(2, VOCAB), "node 2 has token 5"),
        (lambda message: message.sampled_nodes.append(0), "0 bytes of distributions"),
    ],
)
def test_broken_trees_are_refused(spoil: Callable[[tree_pb2.TokenTree], object], message: str) -> None:
    wire = tree_to_wire(TokenTree((1, 2, 3), (-1, 0, 1), confidences=(0.0, -0.5, -1.0)))
    assert len(tree_from_wire(wire, VOCAB)) == 3
    spoil(wire)
    with pytest.raises(InvalidTree, match=message):
        tree_from_wire(wire, VOCAB)
