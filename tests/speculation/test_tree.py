from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.tree import MAX_NODES, InvalidTree, TokenTree, are_sound
from tests.speculation.trees import confident_trees, token_paths, token_trees


@pytest.mark.parametrize(
    ("token_ids", "parents", "message"),
    [
        ((), (), "0 nodes"),
        ((1, 2), (-1,), "2 tokens but 1 parents"),
        ((1,), (0,), "root's parent is 0"),
        ((1, 2), (-1, 1), "node 1 has parent 1"),
        ((1, 2, 3), (-1, 2, 0), "node 1 has parent 2"),
        ((1, 2), (-1, -1), "node 1 has parent -1"),
        ((1, 2, 2), (-1, 0, 0), "node 2 repeats token 2 below node 0"),
        ((1,) * (MAX_NODES + 1), tuple(range(-1, MAX_NODES)), f"{MAX_NODES + 1} nodes"),
    ],
)
def test_broken_trees_are_refused(token_ids: tuple[int, ...], parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidTree, match=message):
        TokenTree(token_ids, parents)


def test_distributions_belong_to_nodes() -> None:
    with pytest.raises(InvalidTree, match=r"nodes \[3\]"):
        TokenTree((1, 2), (-1, 0), {3: torch.ones(4) / 4})


@pytest.mark.parametrize(
    ("confidences", "message"),
    [
        ((0.0, -1.0), "2 confidences for 3 nodes"),
        ((0.5, -1.0, -2.0), "node 0 has confidence 0.5"),
        ((0.0, -1.0, -0.5), r"node 2 has confidence -0.5; it must be finite and at most -1.0"),
        ((0.0, float("nan"), -2.0), "node 1 has confidence nan"),
        ((0.0, -1.0, -float("inf")), "node 2 has confidence -inf"),
    ],
)
def test_confidences_fall_along_paths(confidences: tuple[float, ...], message: str) -> None:
    with pytest.raises(InvalidTree, match=message):
        TokenTree((1, 2, 3), (-1, 0, 1), confidences=confidences)
    chain = TokenTree((1, 2, 3), (-1, 0, 1), confidences=(0.0, -1.0, -1.0))
    assert chain.select([0, 1]).confidences == (0.0, -1.0)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ([0.5, 0.5], "shape"),
        ([0.5, 0.6, 0.1, 0.0], "sum"),
        ([0.6, 0.6, -0.2, 0.0], "negative"),
        ([float("nan"), 0.5, 0.5, 0.0], "infinite"),
        ([0.5, 0.0, 0.5, 0.0], "node 1 has token 3"),
    ],
)
def test_check_vocabulary_refuses_what_is_no_distribution(distribution: list[float], message: str) -> None:
    tree = TokenTree((1, 3), (-1, 0), {0: torch.tensor(distribution)})
    with pytest.raises(InvalidTree, match=message):
        tree.check_vocabulary(4)


def test_check_vocabulary() -> None:
    tree = TokenTree((1, 3), (-1, 0), {0: torch.tensor([0.1, 0.2, 0.3, 0.4])})
    tree.check_vocabulary(4)
    with pytest.raises(InvalidTree, match="token 3; the vocabulary has 3"):
        tree.check_vocabulary(3)
    with pytest.raises(InvalidTree, match="token -1"):
        TokenTree((-1,), (-1,)).check_vocabulary(3)


@given(st.data())
def test_trees_are_sound_together_when_each_of_them_is(data: st.DataObject) -> None:
    trees = data.draw(st.lists(confident_trees(), min_size=1, max_size=4))
    sizes = [len(tree) for tree in trees]
    columns: list[list[Any]] = [
        [entry for tree in trees for entry in getattr(tree, column)]
        for column in ("token_ids", "parents", "confidences")
    ]
    assert are_sound(sizes, *columns)
    column = data.draw(st.integers(0, 2))
    entries = [st.integers(0, 3), st.integers(-2, 6), st.sampled_from([0.5, -0.5, -math.inf, math.nan])]
    columns[column][data.draw(st.integers(0, sum(sizes) - 1))] = data.draw(entries[column])
    sound, start = True, 0
    for size in sizes:
        sound &= _is_sound(*[tuple(entries[start : start + size]) for entries in columns])
        start += size
    assert are_sound(sizes, *columns) == sound


def _is_sound(token_ids: tuple[int, ...], parents: tuple[int, ...], confidences: tuple[float, ...]) -> bool:
    """By the words of TokenTree, one node after the other."""
    for node, (parent, confidence) in enumerate(zip(parents, confidences, strict=True)):
        if not (0 <= parent < node if node else parent == -1):
            return False
        if any(parents[other] == parent and token_ids[other] == token_ids[node] for other in range(node)):
            return False
        if not -math.inf < confidence <= (confidences[parent] if node else 0.0):
            return False
    return True


@given(token_trees())
def test_masks_are_the_paths(tree: TokenTree) -> None:
    depths = tree.depths()
    for node, mask in enumerate(tree.ancestor_masks()):
        path = [0, *tree.path(node)]
        assert mask == sum(1 << ancestor for ancestor in path)
        assert depths[node] == len(path) - 1


@given(token_trees())
def test_depth_first_keeps_paths_and_siblings(tree: TokenTree) -> None:
    ordered = tree.depth_first()
    assert sorted(token_paths(ordered)) == sorted(token_paths(tree))
    siblings = {
        path: [tree.token_ids[child] for child in children]
        for path, children in zip(token_paths(tree), tree.children(), strict=True)
    }
    for path, children in zip(token_paths(ordered), ordered.children(), strict=True):
        assert [ordered.token_ids[child] for child in children] == siblings[path]
    sizes = [sum(mask >> node & 1 for mask in ordered.ancestor_masks()) for node in range(len(ordered))]
    for node, mask in enumerate(ordered.ancestor_masks()):
        for ancestor in range(len(ordered)):
            inside = ancestor <= node < ancestor + sizes[ancestor]
            assert bool(mask >> ancestor & 1) == inside, "a subtree must be consecutive nodes"


def test_select_needs_parents() -> None:
    chain = TokenTree((1, 2, 3), (-1, 0, 1), {0: torch.ones(4) / 4, 1: torch.ones(4) / 4})
    cut = chain.select([0, 1])
    assert (cut.token_ids, cut.parents) == ((1, 2), (-1, 0))
    assert list(cut.distributions) == [0], "node 1 has lost its children"
    with pytest.raises(InvalidTree, match="node 1 is not selected"):
        chain.select([0, 2])
    with pytest.raises(InvalidTree, match="root"):
        chain.select([1, 2])
    for nodes in ([0, 1, 1], [0, 2, 1]):
        with pytest.raises(InvalidTree, match="stands twice, or before its parent"):
            chain.select(nodes)
