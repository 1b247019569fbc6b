"""Trees made one natively against the same by `speculation.merge`, to the last bit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.native import native_available
from services.verifier.candidates import Candidate, make_candidates
from speculation.experience import Reliability
from speculation.tree import InvalidTree, TokenTree
from tests.speculation.trees import confident_trees, token_trees

SOURCES = ("ssm", "look-up", "")
FOREST = st.lists(
    st.sampled_from(SOURCES).flatmap(lambda name: confident_trees(root=2, source=name)), min_size=1, max_size=4
)


def assert_same(made: Candidate, expected: Candidate) -> None:
    for own, other in ((made.tree, expected.tree), (made, expected)):
        assert tuple(own.confidences) == tuple(other.confidences)
    assert (made.tree.token_ids, made.tree.parents) == (expected.tree.token_ids, expected.tree.parents)
    assert (made.tree.source, made.deepest) == (expected.tree.source, expected.deepest)
    assert (made.merged is None) == (expected.merged is None)
    if made.merged is not None and expected.merged is not None:
        assert made.merged.tree is made.tree
        assert made.merged.maps == expected.merged.maps
        assert made.merged.components == expected.merged.components


@st.composite
def experiences(draw: st.DrawFn) -> Reliability:
    """What trees of some sources, alone and merged, have proved to be worth."""
    reliability = Reliability()
    for source in draw(st.lists(st.sampled_from([*SOURCES, "ssm+look-up", "look-up+ssm"]), max_size=6)):
        tree = draw(confident_trees(source=source))
        reliability.learn(tree, range(len(tree)), set(draw(st.lists(st.integers(0, len(tree) - 1)))))
    return reliability


@given(st.lists(st.tuples(FOREST, st.integers(0, 12)), max_size=5), experiences())
def test_native_candidates_are_those_of_python(drafts: list[tuple[list[TokenTree], int]], known: Reliability) -> None:
    assert native_available(), "run python -m kernels.build"
    found = {10 * key: trees for key, (trees, _) in enumerate(drafts)}
    most = {10 * key: nodes for key, (_, nodes) in enumerate(drafts)}
    made = make_candidates(found, most, known)
    assert list(made) == list(found)
    for key, trees in found.items():
        assert_same(made[key], Candidate.of(trees, most[key], known))


@given(st.lists(token_trees(root=2, source="ssm") | confident_trees(root=2, source="look-up"), min_size=1, max_size=3))
def test_trees_without_confidences(trees: list[TokenTree]) -> None:
    known = Reliability()
    assert_same(make_candidates({7: trees}, {7: 9}, known)[7], Candidate.of(trees, 9, known))


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = [TokenTree((0, 1, 2), (-1, 0, 1), confidences=(0.0, -0.5, -0.7)) for _ in range(2)]
    native = make_candidates({1: trees}, {1: 1}, Reliability())
    monkeypatch.setattr("services.verifier.candidates.native_available", lambda: False)
    assert_same(make_candidates({1: trees}, {1: 1}, Reliability())[1], native[1])


def test_what_cannot_be_merged() -> None:
    one, other = (TokenTree((root, 3), (-1, 0), confidences=(0.0, -1.0)) for root in (1, 2))
    with pytest.raises(InvalidTree, match=r"different roots \[1, 2\]"):
        make_candidates({1: [one, other]}, {1: 5}, Reliability())
    chains = [
        TokenTree((0, *[first] * 200), tuple(range(-1, 200)), confidences=(0.0, *[-1.0] * 200)) for first in (1, 2)
    ]
    with pytest.raises(InvalidTree, match="401 nodes"):
        make_candidates({1: chains}, {1: 500}, Reliability())
