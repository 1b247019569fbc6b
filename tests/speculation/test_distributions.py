"""The rules' output has exactly the LLM's distribution, and the test would notice if it had not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from speculation.acceptance import AcceptanceRule, accept
from speculation.calibration import Calibration
from speculation.children import ChildPolicy
from speculation.expansion import StaticExpansion
from speculation.lookup import LookupBounds, Reliability, grow_lookup_tree
from speculation.merge import MergedDraft, merge_trees
from speculation.noise import gumbel_noise
from speculation.suffix_index import SuffixIndex
from speculation.tree import TokenTree
from tests.speculation.models import (
    Drafter,
    best_first_drafter,
    exact_joint,
    generate,
    grow,
    markov_model,
    no_draft,
    perturbed,
    static_drafter,
)
from tests.speculation.models import step as verify
from tests.speculation.statistics import ALPHA, chi_square_p_value

LLM = markov_model(1)
SMALL = [perturbed(LLM, 2), perturbed(LLM, 3, 1.2), markov_model(4)]
MSS = AcceptanceRule.MSS
SAMPLING_RULES = (AcceptanceRule.SHARED_NOISE, AcceptanceRule.MSS, AcceptanceRule.NAIVE)


def joint_counts(rule: AcceptanceRule, llm: torch.Tensor, drafter: Drafter, length: int, samples: int) -> np.ndarray:
    counts = np.zeros((llm.shape[0],) * length)
    for seed in range(samples):
        counts[generate(rule, llm, drafter, seed=seed, length=length)] += 1
    return counts


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(no_draft, id="no draft"),
        pytest.param(static_drafter(MSS, SMALL[:1], (1, 1, 1)), id="chain"),
        pytest.param(static_drafter(MSS, SMALL[:1], (2, 2)), id="tree"),
        pytest.param(static_drafter(MSS, SMALL, (2, 1)), id="three models"),
        pytest.param(best_first_drafter(MSS, SMALL[:1], 6), id="best first"),
        pytest.param(best_first_drafter(MSS, SMALL[:2], 6), id="two models, best first, cut"),
        pytest.param(
            best_first_drafter(MSS, SMALL[:2], 6, [Calibration(disagreement=0.05), Calibration(disagreement=5)]),
            id="two models of different calibrations, best first, cut",
        ),
    ],
)
def test_mss_has_the_models_distribution(drafter: Drafter) -> None:
    assert chi_square_p_value(joint_counts(MSS, LLM, drafter, 3, 1500), exact_joint(LLM, 3)) > ALPHA


@pytest.mark.parametrize("rule", [AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
def test_seeded_rules_have_the_models_distribution(rule: AcceptanceRule) -> None:
    """With one draft; that the text does not depend on the draft is tested with the rules themselves."""
    counts = joint_counts(rule, LLM, static_drafter(rule, SMALL, (2, 1)), 3, 1500)
    assert chi_square_p_value(counts, exact_joint(LLM, 3)) > ALPHA


@pytest.mark.parametrize("rule", SAMPLING_RULES)
def test_filtered_tokens(rule: AcceptanceRule) -> None:
    """Distributions of different support, as top-k makes them: drafts that the LLM cannot say and the reverse."""
    llm, small = (
        model.masked_fill(model < model.topk(3).values[:, -1:], -torch.inf).log_softmax(-1)
        for model in (markov_model(5, 6), perturbed(markov_model(5, 6), 6, 1.5))
    )
    counts = joint_counts(rule, llm, static_drafter(rule, [small], (4, 2)), 2, 1500)
    assert chi_square_p_value(counts, exact_joint(llm, 2)) > ALPHA


Probabilities = tuple[float, ...]
Children = list[list[int]]
"""The children of each step."""

P = (0.1, 0.2, 0.3, 0.4)
Q = (0.5, 0.3, 0.15, 0.05)
R = (0.05, 0.15, 0.6, 0.2)
STEPS = 10000


def draws(q: Probabilities, width: int, seed: int) -> Children:
    """Drawn without replacement."""
    tokens: Children = (torch.tensor(q).log() + gumbel_noise(seed, range(STEPS), len(q))).topk(width).indices.tolist()
    return tokens


def first_tokens(p: Probabilities, drafts: list[tuple[Probabilities, Children]]) -> np.ndarray:
    """Counts of the first token of STEPS steps under MSS, given (q, children of each step) for each component."""
    log_p = torch.tensor(p).log()
    children = [(torch.tensor(q), tokens) for q, tokens in drafts]
    counts = np.zeros(len(p))
    for position in range(STEPS):
        trees = [
            TokenTree((0, *tokens[position]), (-1, *(0 for _ in tokens[position])), {0: q} if tokens[position] else {})
            for q, tokens in children
        ]
        accepted = accept(MSS, merge_trees(trees), lambda _node, _path: log_p, seed=1, position=position)
        counts[accepted.token_ids[0]] += 1
    return counts


@pytest.mark.parametrize(
    "drafts",
    [
        pytest.param([(Q, draws(Q, 1, 2))], id="one draw"),
        pytest.param([(Q, draws(Q, 3, 2))], id="three draws"),
        pytest.param([(Q, draws(Q, 4, 2))], id="all tokens"),
        pytest.param([(Q, draws(Q, 2, 2)), (R, draws(R, 2, 3))], id="two components"),
        pytest.param([(Q, draws(Q, 1, 2)), (Q, draws(Q, 1, 3)), (Q, draws(Q, 2, 4))], id="three like components"),
    ],
)
def test_one_step_of_mss(drafts: list[tuple[Probabilities, Children]]) -> None:
    assert chi_square_p_value(first_tokens(P, drafts), np.array(P)) > ALPHA


def test_a_biased_rule_is_noticed() -> None:
    """With p = (.5, .5), q = (.9, .1) and a fixed most likely child, P(token 0) would be .5 / .9 = .556."""
    p, q = (0.5, 0.5), (0.9, 0.1)
    biased = first_tokens(p, [(q, [[0]] * STEPS)])
    assert chi_square_p_value(biased, np.array(p)) < ALPHA
    assert biased[0] / STEPS == pytest.approx(0.5 / 0.9, abs=0.015)


def test_draws_that_depend_on_each_other_are_noticed() -> None:
    """Two components that drew with the same noise: why every source needs a stream of its own."""
    counts = first_tokens(P, [(Q, draws(Q, 1, 2)), (Q, draws(Q, 1, 2))])
    assert chi_square_p_value(counts, np.array(P)) < ALPHA


def test_pruning_draws_is_noticed() -> None:
    """Dropping drawn children that look unlikely: the mistake that best-first growth must not make."""
    likely = [[token for token in row if Q[token] > 0.2] for row in draws(Q, 1, 2)]
    assert chi_square_p_value(first_tokens(P, [(Q, likely)]), np.array(P)) < ALPHA


def test_children_that_were_not_drawn_do_not_bias_mss() -> None:
    """A top-k tree under MSS is treated as the naive rule treats it."""
    tops = static_drafter(AcceptanceRule.NAIVE, SMALL[:1], (2, 2))
    counts = joint_counts(MSS, LLM, tops, 2, 1500)
    assert chi_square_p_value(counts, exact_joint(LLM, 2)) > ALPHA


def first_tokens_beside(looked_up: Callable[[int], TokenTree], max_nodes: int) -> np.ndarray:
    """Counts of the first token of 3000 steps with two draws, merged with a tree that was not drawn, and cut."""
    counts = np.zeros(len(P))
    q, log_p = torch.tensor(Q), torch.tensor(P).log()
    for position, drawn in enumerate(draws(Q, 2, 2)[:3000]):
        sampled = TokenTree((0, *drawn), (-1, 0, 0), {0: q})
        draft = merge_trees([sampled, looked_up(position)], max_nodes)
        accepted = accept(MSS, draft, lambda _node, _path: log_p, seed=1, position=position)
        counts[accepted.token_ids[0]] += 1
    return counts


def wide(children: int) -> TokenTree:
    return TokenTree((0, *range(children)), (-1, *(0 for _ in range(children))))


@pytest.mark.parametrize("max_nodes", [5, 3])
def test_a_tree_that_was_not_drawn_may_cut_draws(max_nodes: int) -> None:
    """Its size differs from step to step, but with nothing that the step draws: 3 nodes cut what 1 does not."""
    counts = first_tokens_beside(lambda position: wide(3 if position % 2 else 1), max_nodes)
    assert chi_square_p_value(counts, np.array(P)) > ALPHA


def test_a_tree_whose_size_depends_on_the_draws_is_noticed() -> None:
    """What a look-up must not do that has seen text of the same noise: the cut would then prefer some draws."""
    drawn = draws(Q, 2, 2)
    counts = first_tokens_beside(lambda position: wide(3 if drawn[position][0] == 0 else 1), 3)
    assert chi_square_p_value(counts, np.array(P)) < ALPHA


@pytest.mark.parametrize("max_nodes", [4, 7, 20])
def test_mss_beside_look_up(max_nodes: int) -> None:
    """In the text so far, over several steps, with levels that are cut by the size of both."""
    rule, widths, bounds = MSS, (2, 1), LookupBounds(nodes=4, depth=3)
    text = [0, 1, 2, 0, 1, 3, 0, 2, 1, 0, 3, 3, 0, 0]
    reliability = Reliability()
    cut = 0

    def step(tokens: list[int], seed: int) -> MergedDraft:
        nonlocal cut
        index = SuffixIndex()
        index.extend(tokens)
        looked_up = grow_lookup_tree(index, tokens, reliability, bounds, "prompt-lookup").tree
        policies = [ChildPolicy(rule.selection, seed, stream) for stream in range(2)]
        sampled = [
            grow(StaticExpansion(tokens[-1], len(tokens), policy, widths=widths, max_nodes=6), model)
            for policy, model in zip(policies, SMALL, strict=False)
        ]
        cut += sum(map(len, [*sampled, looked_up])) - 3 > max_nodes
        return merge_trees([*sampled, looked_up], max_nodes)

    counts = np.zeros((4, 4))
    for seed in range(1000):
        tokens = list(text)
        while len(tokens) < len(text) + 2:
            draft = step(tokens, seed)
            tokens.extend(verify(rule, LLM, draft, seed, len(tokens)).token_ids)
        counts[tuple(tokens[len(text) : len(text) + 2])] += 1
    assert (cut > 0) == (max_nodes < 20)
    assert chi_square_p_value(counts, exact_joint(LLM, 2)) > ALPHA
