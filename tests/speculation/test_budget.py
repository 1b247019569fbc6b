"""The choices against all others, tried one by one."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.budget import Choice, StepPrice, best_prefix, choose_alone, choose_drafting, nodes_that_pay
from speculation.experience import Gain, LinearFit, Reliability, promises
from speculation.tree import TokenTree
from tests.speculation.trees import confident_trees

rising = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=12).map(lambda steps: 0.5 + np.cumsum(steps))
chances = st.floats(0.01, 1.0)


@given(st.integers(0, 8), rising, st.lists(chances, max_size=15))
def test_no_other_prefix_is_faster(tokens: int, seconds: np.ndarray, probabilities: list[float]) -> None:
    falling = sorted(probabilities, reverse=True)
    count, gained = best_prefix(StepPrice(tokens, seconds), falling)
    assert gained == pytest.approx(sum(falling[:count]))
    rates = [(tokens + sum(falling[:k])) / seconds[k] for k in range(min(len(falling), len(seconds) - 1) + 1)]
    assert rates[count] == pytest.approx(max(rates))


@given(st.integers(1, 4), rising, st.lists(confident_trees(max_nodes=8), max_size=3))
def test_what_is_kept_is_a_tree_and_the_best_set_of_nodes(
    tokens: int, seconds: np.ndarray, drafts: list[TokenTree]
) -> None:
    step = StepPrice(tokens, seconds)
    kept, expected = nodes_that_pay([tree.confidences for tree in drafts], step)
    for tree, nodes in zip(drafts, kept, strict=True):
        assert nodes == sorted(nodes)
        assert nodes[0] == 0
        assert all(tree.parents[node] in nodes for node in nodes[1:])
    pairs = zip(drafts, kept, strict=True)
    gained = sum(math.exp(tree.confidences[node]) for tree, nodes in pairs for node in nodes[1:])
    assert gained == pytest.approx(expected)
    rate = (tokens + gained) / seconds[sum(len(nodes) - 1 for nodes in kept)]
    everything = sorted((math.exp(c) for tree in drafts for c in tree.confidences[1:]), reverse=True)
    best = max((tokens + sum(everything[:k])) / seconds[k] for k in range(min(len(everything), len(seconds) - 1) + 1))
    assert rate == pytest.approx(best)


@given(st.data())
def test_drafting_is_chosen_when_it_pays_and_never_otherwise(data: st.DataObject) -> None:
    options, sizes, sequences = data.draw(st.integers(1, 3)), [1, 2, 4], data.draw(st.integers(1, 4))
    cost, gain = st.floats(0, 2), st.floats(0, 4)
    once = np.array([data.draw(cost) for _ in range(options)])
    each = np.array([[[data.draw(cost) for _ in range(sequences)] for _ in sizes] for _ in range(options)])
    gains = np.array([[[data.draw(gain) for _ in range(sequences)] for _ in sizes] for _ in range(options)])
    seconds = 1 + np.cumsum([data.draw(st.floats(0, 1)) for _ in range(4 * sequences + 1)])
    price = StepPrice(sequences, seconds)
    choice = choose_drafting(price, once, each, sizes, gains, np.ones(options))
    plain = sequences / seconds[0]
    assert choice.rate >= plain
    if not choice.chosen:
        return
    place = (choice.option, sizes.index(choice.size))
    chosen = list(choice.chosen)
    assert choice.tokens == pytest.approx(sequences + gains[place][chosen].sum())
    spent = seconds[choice.size * len(chosen)] + once[choice.option] + each[place][chosen].sum()
    assert choice.seconds == pytest.approx(spent)
    for option, size in itertools.product(range(options), range(len(sizes))):
        whole = sequences + gains[option, size].sum()
        cost_of_all = seconds[sizes[size] * sequences] + once[option] + each[option, size].sum()
        assert choice.rate >= whole / cost_of_all * (1 - 1e-9), "drafting for all is no better"


def test_what_is_hoped_for_decides_whether_to_draft_and_not_how_much() -> None:
    """Trees of 1, 2 or 4 nodes for both of two sequences, in steps of 1 s and 0.3 s more for each row."""
    price = StepPrice(2, np.linspace(1.0, 3.4, 9))
    gains = np.array([[[0.4] * 2, [0.55] * 2, [0.8] * 2]])

    def choice(hope: float) -> Choice:
        return choose_drafting(price, np.zeros(1), np.zeros((1, 3, 2)), [1, 2, 4], gains, np.array([hope]))

    assert choice(1.0).chosen == ()
    hopeful = choice(3.0)
    assert (hopeful.chosen, hopeful.size) == ((0, 1), 1), "the best size of these gains, though not of thrice as many"
    assert (hopeful.tokens, hopeful.hoped) == pytest.approx((2.8, 4.4))
    assert hopeful.rate < 2 < hopeful.hoped_rate


def test_what_sharing_the_nodes_gains_counts() -> None:
    """Two trees of a node each, in steps of 1 s for each row: as equal ones they do not pay."""
    price, free = StepPrice(2, np.array([1.0, 2.0, 3.0])), np.zeros((1, 1, 2))

    def choice(sharing: float) -> Choice:
        return choose_drafting(price, np.zeros(1), free, [1], np.full((1, 1, 2), 0.8), np.ones(1), sharing)

    assert choice(1.0).chosen == ()
    shared = choice(2.0)
    assert shared.chosen == (0,)
    assert (shared.tokens, shared.seconds, shared.rate) == pytest.approx((2.8, 1.0, 2.8))


def test_no_sequence_no_draft() -> None:
    nobody = np.zeros((1, 1, 0))
    choice = choose_drafting(StepPrice(2, np.ones(1)), np.zeros(1), nobody, [1], nobody, np.ones(1))
    assert (choice.chosen, choice.rate) == ((), 2.0)


@given(confident_trees(max_nodes=10), st.lists(st.booleans(), min_size=1, max_size=9))
def test_corrected_confidences_make_a_valid_tree(tree: TokenTree, right: list[bool]) -> None:
    reliability = Reliability()
    accepted = {node for node in range(1, len(tree)) if right[node % len(right)]}
    for _ in range(20):
        reliability.learn(tree, range(len(tree)), accepted)
        corrected = tree.with_confidences(tuple(reliability.corrected(tree)))
        assert corrected.confidences[0] == 0, "and the tree checks itself"


def test_promises_are_corrected_by_what_came_true_at_each_depth() -> None:
    reliability, draw = Reliability(), random.Random(3)
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 1), {}, "a", tuple(map(math.log, (1, 0.8, 0.1, 0.7))))
    for _ in range(2000):
        first = draw.random() < 0.45
        reliability.learn(tree, range(4), {1, 3} if first and draw.random() < 0.5 else {1} if first else set())
    assert reliability.ratio("a", 1) == pytest.approx(0.45 / 0.9, rel=0.2)
    assert reliability.ratio("a", 2) == pytest.approx(0.225 / 0.7, rel=0.3)
    assert math.exp(reliability.corrected(tree)[1]) == pytest.approx(0.4, rel=0.2)
    assert reliability.corrected(TokenTree((1, 2), (-1, 0), {}, "b", (0.0, -1.0))) == [0.0, -1.0]


def test_nodes_that_were_not_verified_teach_nothing() -> None:
    reliability = Reliability()
    tree = TokenTree((1, 2, 3), (-1, 0, 1), {}, "a", (0.0, -0.1, -0.2))
    for _ in range(50):
        reliability.learn(tree, [0, 1], {1})
    assert reliability.ratio("a", 1) > 1
    assert reliability.ratio("a", 2) == 1
    assert reliability.ratio("b", 1) == 1, "of another source"


def test_a_tree_without_estimates_is_guessed_by_depth_and_place() -> None:
    assert np.exp(promises(TokenTree((1, 2, 3, 4), (-1, 0, 0, 1)))).tolist() == pytest.approx([1, 0.5, 0.25, 0.25])


def test_gains_follow_what_trees_promise() -> None:
    gain = Gain([1, 2, 4, 8])
    for _ in range(300):
        gain.learn([0.9, 0.5, 0.1], asked=4)
    assert gain.expected[:3] == pytest.approx([0.9, 1.4, 1.5], abs=0.01)
    before = Gain([1, 2, 4, 8]).expected
    beyond = gain.expected[3] - gain.expected[2]
    assert beyond == pytest.approx(before[3] - before[2]), "nothing is known of what more room adds"


def test_a_fit_finds_the_weights_and_keeps_the_prior_where_nothing_is_seen() -> None:
    fit = LinearFit((1.0, 1.0, 5.0), (1, 1, 1))
    for turn in range(500):
        fit.observe((1, turn % 7, 0), 3 + 2 * (turn % 7))
    assert fit.solve() == pytest.approx([3, 2, 5], abs=0.1)
    assert fit.predict((1, 2, 0)) == pytest.approx(7, abs=0.1)


@given(st.data())
def test_each_sequence_alone_gets_the_size_that_pays_most(data: st.DataObject) -> None:
    sizes, sequences = [1, 2, 4], data.draw(st.integers(1, 4))
    cost, gain = st.floats(0, 2), st.floats(0, 4)
    seconds, gains = (np.array([[data.draw(kind) for _ in range(sequences)] for _ in sizes]) for kind in (cost, gain))
    step = StepPrice(sequences, 1 + np.cumsum([data.draw(st.floats(0, 1)) for _ in range(5)]))
    chosen = choose_alone(step, seconds, sizes, gains)
    for place, size in enumerate(chosen):
        rates = {0: sequences / step.of(0)}
        for index, nodes in enumerate(sizes):
            rates[nodes] = (sequences + gains[index, place]) / (step.of(nodes) + seconds[index, place])
        assert rates[size] == pytest.approx(max(rates.values()))
        alone = choose_alone(step, seconds[:, [place]], sizes, gains[:, [place]])
        assert alone == [size], "whatever the others are expected to bring"
