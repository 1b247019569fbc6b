"""The index finds what a search through all texts finds, forgets what is too old, and gives its memory back."""

from __future__ import annotations

import gc
import time
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.suffix_index import MAX_MATCH, MAX_OCCURRENCES, MIN_MATCH, SuffixIndex

Text = list[int]

texts = st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=5)
pieces = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8)


def random_text(seed: int, length: int, vocab_size: int = 5000) -> Text:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(length, generator=generator).abs() * vocab_size / 4).int().tolist()


def continuations(index: SuffixIndex, tail: Text, depth: int) -> tuple[int, list[Text]]:
    """Length of the match, and the up to `depth` tokens behind each occurrence, newest first."""
    found = index.find(tail)
    behind: list[Text] = []
    for position in found.positions:
        text: Text = []
        positions = [position]
        while len(text) < depth and (groups := index.following(positions)):
            ((token_id, positions),) = groups.items()
            text.append(token_id)
        behind.append(text)
    return found.length, behind


def searched(texts: list[Text], tail: Text, depth: int) -> tuple[int, list[Text]]:
    """The same by comparing every place of every text."""
    matches: list[tuple[int, Text]] = []
    for text in reversed(texts):
        for end in range(len(text) - 1, 0, -1):
            length = 0
            while length < min(end, len(tail), MAX_MATCH) and text[end - length - 1] == tail[-length - 1]:
                length += 1
            if length >= MIN_MATCH:
                matches.append((length, text[end : end + depth]))
    longest = max((length for length, _ in matches), default=0)
    return longest, [behind for length, behind in matches if length == longest]


@given(texts, st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_finds_what_a_search_finds(texts: list[Text], tail: Text) -> None:
    index = SuffixIndex()
    for text in texts:
        index.add_text(text)
    length, behind = continuations(index, tail, 6)
    expected_length, expected = searched(texts, tail, 6)
    # A chain is followed for MAX_OCCURRENCES only: with more, an older and longer match may be missed.
    if sum(map(len, texts)) < MAX_OCCURRENCES:
        assert (length, behind) == (expected_length, expected)
    assert length <= expected_length
    assert len(behind) <= MAX_OCCURRENCES


@given(pieces)
def test_a_text_grown_piece_by_piece_is_one_text(pieces: list[Text]) -> None:
    grown, whole = SuffixIndex(), SuffixIndex()
    for piece in pieces:
        grown.extend(piece)
    text = [token for piece in pieces for token in piece]
    whole.extend(text)
    assert continuations(grown, text, 6) == continuations(whole, text, 6)
    if 0 < len(text) < MAX_OCCURRENCES:
        assert continuations(whole, text, 6) == searched([text], text, 6)


@given(texts, st.integers(1, 40), st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_with_a_capacity_it_knows_the_newest_tokens_alone(texts: list[Text], capacity: int, tail: Text) -> None:
    index = SuffixIndex(capacity)
    for text in texts:
        index.add_text(text)
    assert len(index) == min(capacity, sum(map(len, texts)) + len(texts))
    assert index.entries <= 2 * capacity
    kept: list[Text] = [[]]
    for token in [token for text in texts for token in (-1, *text)][-capacity:]:
        if token == -1:
            kept.append([])
        else:
            kept[-1].append(token)
    length, behind = continuations(index, tail, 6)
    assert length <= searched(kept, tail, 6)[0]
    for text in behind:
        assert any(text == each[i : i + len(text)] for each in kept for i in range(len(each)))


def test_context_is_matched_but_never_proposed() -> None:
    index = SuffixIndex()
    index.add_text([1, 2, 3, 4, 5], context=3)
    assert continuations(index, [1, 2], 3) == (0, [])
    assert continuations(index, [9, 2, 3], 3) == (2, [[4, 5]])


def test_no_match_goes_over_the_end_of_a_text() -> None:
    index = SuffixIndex()
    index.add_text([1, 2])
    index.add_text([3, 4])
    assert index.find([2, 3]).length == 0
    assert index.find([1, 2]).length == 0
    assert index.find([7]).length == index.find([]).length == 0


def test_a_capacity_of_none_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        SuffixIndex(0)


def test_memory_is_bounded_and_given_back() -> None:
    def memory() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = memory()
        index = SuffixIndex(5000)
        sizes = []
        for seed in range(12):
            index.add_text(random_text(seed, 2500))
            sizes.append(memory() - before)
        assert max(sizes) < 5000 * 400
        assert sizes[-1] < 1.5 * sizes[2]
        index.add_text([1] * 5000)  # pushes everything else out
        assert index.entries <= 20
        del index
        assert memory() - before < 10_000
    finally:
        tracemalloc.stop()


def test_constant_time_for_each_token_and_each_query() -> None:
    """Far above what it takes, to hold on a busy machine: about 1.4 us a token with eviction, 10 us a query."""
    index = SuffixIndex(20_000)
    text = random_text(1, 60_000)
    started = time.perf_counter()
    index.extend(text)
    assert (time.perf_counter() - started) / len(text) < 30e-6
    index.add_text([1, 2] * 5000)  # one n-gram everywhere
    started = time.perf_counter()
    for _ in range(100):
        assert len(index.find([1, 2] * 20).positions) == MAX_OCCURRENCES
    assert (time.perf_counter() - started) / 100 < 3e-3
