from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.merge import MergedDraft, merge_trees
from speculation.tree import InvalidTree, TokenTree
from tests.speculation.trees import Path, confident_trees, token_path, token_paths, token_trees

forests = st.lists(token_trees(root=2, source="a") | confident_trees(root=2, source="a"), min_size=1, max_size=4)


def probability(tree: TokenTree, node: int) -> float:
    """The tree's estimate that the node is accepted; without one, half for each place along its path."""
    if tree.confidences:
        return math.exp(tree.confidences[node])
    children = tree.children()
    return math.prod(0.5 ** (1 + children[tree.parents[above]].index(above)) for above in tree.path(node))


def merged_probabilities(trees: Sequence[TokenTree]) -> dict[Path, float]:
    """Noisy-or of every path of the union, by its definition; in the order in which the paths are first met."""
    missed: dict[Path, float] = {}
    for tree in trees:
        for node, path in enumerate(token_paths(tree)):
            missed[path] = missed.get(path, 1.0) * (1 - probability(tree, node))
    return {path: 1 - product for path, product in missed.items()}


@given(forests)
def test_union_of_the_paths_of_all(trees: list[TokenTree]) -> None:
    draft = merge_trees(trees)
    paths = token_paths(draft.tree)
    assert len(set(paths)) == len(paths)
    assert set(paths) == {path for tree in trees for path in token_paths(tree)}
    assert draft.tree.subtree_order() == list(range(len(draft.tree)))


@given(forests, st.none() | st.integers(0, 12))
def test_maps_lead_to_the_same_path(trees: list[TokenTree], max_nodes: int | None) -> None:
    draft = merge_trees(trees, max_nodes)
    paths = token_paths(draft.tree)
    assert len(draft.components) == len(draft.maps) == len(trees)
    for component, mapping in zip(draft.components, draft.maps, strict=True):
        for path, node in zip(token_paths(component), mapping, strict=True):
            assert path == paths[node] if node >= 0 else path not in paths


@given(forests)
def test_order_and_repetition_do_not_matter(trees: list[TokenTree]) -> None:
    merged = set(token_paths(merge_trees(trees).tree))
    assert set(token_paths(merge_trees(trees[::-1]).tree)) == merged
    assert set(token_paths(merge_trees([*trees, *trees]).tree)) == merged


@given(token_trees())
def test_one_tree_stays(tree: TokenTree) -> None:
    merged = MergedDraft.single(tree).tree
    assert (merged.token_ids, merged.parents) == (tree.depth_first().token_ids, tree.depth_first().parents)
    twice = merge_trees([tree, tree]).tree
    assert (twice.token_ids, twice.parents) == (merged.token_ids, merged.parents)


@given(forests, st.integers(0, 12))
def test_cut_keeps_as_much_as_it_may(trees: list[TokenTree], max_nodes: int) -> None:
    whole, cut = merge_trees(trees).tree, merge_trees(trees, max_nodes).tree
    assert len(cut) == min(len(whole), max_nodes + 1)
    assert set(token_paths(cut)) <= set(token_paths(whole))


@given(forests)
def test_confidences_are_the_noisy_or(trees: list[TokenTree]) -> None:
    tree = merge_trees(trees).tree
    expected = merged_probabilities(trees)
    assert len(tree.confidences) == len(tree)
    for node, confidence in enumerate(tree.confidences):
        assert math.exp(confidence) == pytest.approx(expected[token_path(tree, node)], abs=1e-12)


def chain(*confidences: float) -> TokenTree:
    return TokenTree((0, 1, 2), (-1, 0, 1), confidences=(0.0, *confidences))


@pytest.mark.parametrize("confidence", [-0.32, -0.34, -0.42])
def test_rounding_makes_no_child_surer_than_its_parent(confidence: float) -> None:
    """Here the formula itself, in floating point, gives the child one last bit more than its parent."""
    first = chain(confidence, math.nextafter(confidence, -1))
    tree = merge_trees([first, chain(-0.5, -0.5)]).tree
    assert tree.confidences[2] == tree.confidences[1] > confidence


def test_confidences_by_hand() -> None:
    first, second = chain(math.log(0.5), math.log(0.2)), chain(math.log(0.6), math.log(0.1))
    assert merge_trees([first, second]).tree.confidences == pytest.approx((0, math.log(0.8), math.log(0.28)))
    assert merge_trees([first, second, chain(0, 0)]).tree.confidences == (0, 0, 0)
    # A probability below the smallest number: p + p = 2 p
    assert merge_trees([chain(-1, -800)] * 2).tree.confidences[2] == pytest.approx(-800 + math.log(2), abs=1e-9)
    # One above the largest below 1: 1 - (1 - p)^2 = 1 - 1e-20
    assert merge_trees([chain(-1e-10, -1)] * 2).tree.confidences[1] == pytest.approx(-1e-20, abs=1e-25)
    # Without an estimate: 1/2 for the first child of a first child.. and 1/4 for a second one
    ranked = TokenTree((0, 1, 2, 3), (-1, 0, 1, 0))
    assert merge_trees([ranked]).tree.confidences == pytest.approx([-n * math.log(2) for n in (0, 1, 2, 2)])


@given(forests, st.integers(0, 12))
def test_cut_keeps_the_most_probable_nodes(trees: list[TokenTree], max_nodes: int) -> None:
    whole = merge_trees(trees).tree
    confidences = dict(zip(token_paths(whole), whole.confidences, strict=True))
    # sorted is stable: of equally probable nodes the one first met
    ranked = sorted(merged_probabilities(trees), key=confidences.__getitem__, reverse=True)
    cut = merge_trees(trees, max_nodes).tree
    assert set(token_paths(cut)) == set(ranked[: max_nodes + 1])
    assert cut.confidences == tuple(confidences[path] for path in token_paths(cut))


@given(forests, st.integers(0, 12))
def test_the_most_probable_sibling_stands_first(trees: list[TokenTree], max_nodes: int) -> None:
    tree = merge_trees([*trees, TokenTree.root_only(2)], max_nodes).tree
    for children in tree.children():
        confidences = [tree.confidences[child] for child in children]
        assert confidences == sorted(confidences, reverse=True)


def test_sources_are_named_in_order() -> None:
    trees = [TokenTree((0, 3), (-1, 0), source=source) for source in ("b", "a", "", "b")]
    assert merge_trees(trees).tree.source == "b+a"


def test_cut_prefers_what_several_propose() -> None:
    wide = TokenTree((0, 1, 2, 3), (-1, 0, 0, 0))
    other = TokenTree((0, 3), (-1, 0))
    assert token_paths(merge_trees([wide, other], 1).tree) == [(), (3,)]
    assert token_paths(merge_trees([wide], 1).tree) == [(), (1,)]


def test_cut_prefers_the_surer_draft() -> None:
    unsure = TokenTree((0, 1, 2), (-1, 0, 1), confidences=(0.0, -1.5, -2.0))
    sure = TokenTree((0, 3, 4), (-1, 0, 1), confidences=(0.0, -0.1, -0.3))
    for trees in ([unsure, sure], [sure, unsure]):
        assert token_paths(merge_trees(trees, 2).tree) == [(), (3,), (3, 4)]
        assert token_paths(merge_trees(trees).tree) == [(), (3,), (3, 4), (1,), (1, 2)]


def test_sampled_trees_lose_whole_levels() -> None:
    q = torch.ones(4) / 4
    first = TokenTree((0, 1, 2, 3), (-1, 0, 0, 1), {0: q, 1: q})
    second = TokenTree((0, 1, 2), (-1, 0, 1), {0: q, 1: q})
    # Levels of 3 and 2 nodes: the draws of token 1 by both count twice, since that they coincide is chance.
    for max_nodes, levels in ((5, 2), (4, 1), (3, 1), (2, 0)):
        draft = merge_trees([first, second], max_nodes)
        assert max(draft.tree.depths()) == levels
        for component in draft.components:
            assert max(component.depths()) == levels
            assert sorted(component.distributions) == list(range(levels))


def test_draws_stay_in_their_order_however_sure_the_draft_is() -> None:
    q = torch.ones(4) / 4
    drawn = TokenTree((0, 1, 2), (-1, 0, 0), {0: q}, confidences=(0.0, -3.0, -3.0))
    other = TokenTree((0, 2, 3), (-1, 0, 0), {0: q}, confidences=(0.0, -0.1, -2.0))
    draft = merge_trees([drawn, other], 4)
    assert draft.tree.token_ids == (0, 1, 2, 3)
    assert draft.components == (drawn, other)
    assert merge_trees([drawn, other], 3).tree.token_ids == (0,), "no draw is worth more than another"


def test_what_cannot_be_merged() -> None:
    with pytest.raises(InvalidTree, match="no tree"):
        merge_trees([])
    with pytest.raises(InvalidTree, match=r"different roots \[1, 2\]"):
        merge_trees([TokenTree.root_only(1), TokenTree.root_only(2)])
    with pytest.raises(ValueError, match="max_nodes is -1"):
        merge_trees([TokenTree.root_only(1)], -1)
    chains = [TokenTree((0, *(first for _ in range(200))), tuple(range(-1, 200))) for first in (1, 2)]
    with pytest.raises(InvalidTree, match="401 nodes"):
        merge_trees(chains)
