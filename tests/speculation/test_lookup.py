"""Trees of look-up: their shape, their probabilities, and what they learn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.lookup import LookupBounds, LookupDraft, Reliability, grow_lookup_tree
from speculation.suffix_index import MAX_MATCH, SuffixIndex
from tests.speculation.trees import token_path, token_paths


def index_of(*texts: list[int]) -> SuffixIndex:
    index = SuffixIndex()
    for text in texts:
        index.add_text(text)
    return index


def grow(index: SuffixIndex, tail: list[int], reliability: Reliability | None = None, **bounds: object) -> LookupDraft:
    values: dict[str, object] = {"nodes": 12, "depth": 5} | bounds
    return grow_lookup_tree(index, tail, reliability or Reliability(), LookupBounds(**values), "look-up")  # type: ignore[arg-type]  # the tests' own


def test_no_match_gives_the_root_alone() -> None:
    draft = grow(index_of([1, 2, 3]), [3, 1])
    assert (draft.tree.token_ids, draft.claims) == ((1,), {})
    assert grow(SuffixIndex(), [5]).tree.token_ids == (5,)
    assert grow(index_of([1, 2, 3]), [1, 2], nodes=0).tree.token_ids == (2,)


def test_probability_is_share_times_reliability_of_the_grown_match() -> None:
    reliability = Reliability()
    draft = grow(index_of([1, 2, 3, 5], [1, 2, 3, 6], [1, 2, 4, 7]), [8, 1, 2], reliability)
    found = {path: math.exp(draft.tree.confidences[node]) for node, path in enumerate(token_paths(draft.tree))}
    r2, r3 = reliability.of(2), reliability.of(3)
    assert found == pytest.approx(
        {
            (): 1.0,
            (3,): 2 / 3 * r2,
            (4,): 1 / 3 * r2,
            (4, 7): 1 / 3 * r2 * r3,
            (3, 5): 2 / 3 * r2 * r3 / 2,
            (3, 6): 2 / 3 * r2 * r3 / 2,
        }
    )
    assert draft.tree.source == "look-up"


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=25), max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(0, 12),
    st.integers(1, 5),
    st.lists(st.integers(1, 3), max_size=4),
    st.floats(0, 0.5),
)
def test_bounds_hold(
    texts: list[list[int]], tail: list[int], nodes: int, depth: int, widths: list[int], floor: float
) -> None:
    tree = grow(index_of(*texts), tail, nodes=nodes, depth=depth, widths=tuple(widths), floor=floor).tree
    depths = tree.depths()
    assert len(tree) <= nodes + 1
    assert max(depths) <= (min(depth, len(widths)) if widths else depth)
    for node, children in enumerate(tree.children()):
        assert len(children) <= (widths[depths[node]] if widths and children else nodes)
    assert all(math.exp(confidence) >= floor * (1 - 1e-9) for confidence in tree.confidences)
    assert list(tree.confidences) == sorted(tree.confidences, reverse=True), "best first"
    longer = grow(index_of(*texts), tail, nodes=12, depth=depth, widths=tuple(widths), floor=floor).tree
    assert token_paths(tree) == token_paths(longer)[: len(tree)], "a smaller tree has the best nodes of a larger one"


def test_longer_matches_are_trusted_more_until_experience_says_otherwise() -> None:
    reliability = Reliability()
    priors = [reliability.of(length) for length in range(1, MAX_MATCH + 1)]
    assert priors == sorted(priors)
    assert reliability.of(100) == reliability.of(MAX_MATCH) < 1
    for _ in range(2000):
        reliability.learn(7, False)
    assert reliability.of(7) < 0.01
    for _ in range(2000):
        reliability.learn(7, True)
    assert reliability.of(7) > 0.95, "what is old fades"
    assert reliability.of(6) == priors[5]


def test_learns_from_every_claim_on_the_way_and_from_none_beyond() -> None:
    index = index_of([1, 2, 3, 4, 5], [1, 2, 9])
    before = Reliability()
    for tokens, changed in (
        ([3, 4, 5], {2: True, 3: True, 4: True}),
        ([9, 1], {2: True}),  # nothing is known behind 9
        ([3, 7, 5], {2: True, 3: False}),
        ([8], {2: False}),
        ([], {}),
    ):
        reliability = Reliability()
        grow(index, [1, 2], reliability).teach(reliability, tokens)
        for length in range(MAX_MATCH + 1):
            better = reliability.of(length) > before.of(length)
            assert better if changed.get(length) else not better
            assert (reliability.of(length) != before.of(length)) == (length in changed)


def test_a_claim_that_the_floor_left_out_is_learned_from_too() -> None:
    reliability = Reliability()
    for _ in range(300):
        reliability.learn(2, False)
    index = index_of([1, 2, 3])
    draft = grow(index, [1, 2], reliability, floor=0.3)
    assert len(draft.tree) == 1
    for _ in range(600):
        grow(index, [1, 2], reliability, floor=0.3).teach(reliability, [3])
    assert len(grow(index, [1, 2], reliability, floor=0.3).tree) == 2


def test_confidences_are_calibrated() -> None:
    """A text whose next token is right in 6 of 10 cases: nodes of probability p are right about as often as p says."""
    reliability = Reliability()
    index = index_of([1, 2, 3])
    hits = [True, False, True, False, True, True, False, True, False, True]
    for step in range(400):
        grow(index, [1, 2], reliability).teach(reliability, [3 if hits[step % 10] else 4])
    tree = grow(index, [1, 2], reliability).tree
    assert token_path(tree, 1) == (3,)
    assert math.exp(tree.confidences[1]) == pytest.approx(0.6, abs=0.05)
