from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.merge import MergedDraft, merge_trees
from speculation.tree import InvalidTree, TokenTree
from tests.speculation.trees import token_paths, token_trees

forests = st.lists(token_trees(root=2, source="a"), min_size=1, max_size=4)


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


def test_first_tree_first() -> None:
    draft = merge_trees([TokenTree((0, 3), (-1, 0), source="a"), TokenTree((0, 1, 3), (-1, 0, 0), source="b")])
    assert draft.tree.token_ids == (0, 3, 1)
    assert draft.tree.source == "a+b"


def test_cut_prefers_what_several_propose() -> None:
    wide = TokenTree((0, 1, 2, 3), (-1, 0, 0, 0))
    other = TokenTree((0, 3), (-1, 0))
    assert token_paths(merge_trees([wide, other], 1).tree) == [(), (3,)]
    assert token_paths(merge_trees([wide], 1).tree) == [(), (1,)]


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
