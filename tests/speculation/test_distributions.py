"""The rules' output has exactly the LLM's distribution, and the test would notice if it had not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speculation.acceptance import AcceptanceRule, accept
from speculation.merge import MergedDraft
from speculation.noise import gumbel_noise
from speculation.tree import TokenTree
from tests.speculation.models import (
    Drafter,
    best_first_drafter,
    exact_joint,
    generate,
    markov_model,
    no_draft,
    perturbed,
    static_drafter,
)
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
    ],
)
def test_mss_has_the_models_distribution(drafter: Drafter) -> None:
    assert chi_square_p_value(joint_counts(MSS, LLM, drafter, 3, 3000), exact_joint(LLM, 3)) > ALPHA


@pytest.mark.parametrize("rule", [AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
def test_seeded_rules_have_the_models_distribution(rule: AcceptanceRule) -> None:
    """With one draft; that the text does not depend on the draft is tested with the rules themselves."""
    counts = joint_counts(rule, LLM, static_drafter(rule, SMALL, (2, 1)), 3, 3000)
    assert chi_square_p_value(counts, exact_joint(LLM, 3)) > ALPHA


@pytest.mark.parametrize("rule", SAMPLING_RULES)
def test_filtered_tokens(rule: AcceptanceRule) -> None:
    """Distributions of different support, as top-k makes them: drafts that the LLM cannot say and the reverse."""
    llm, small = (
        model.masked_fill(model < model.topk(3).values[:, -1:], -torch.inf).log_softmax(-1)
        for model in (markov_model(5, 6), perturbed(markov_model(5, 6), 6, 1.5))
    )
    counts = joint_counts(rule, llm, static_drafter(rule, [small], (4, 2)), 2, 2000)
    assert chi_square_p_value(counts, exact_joint(llm, 2)) > ALPHA


def first_tokens(p: list[float], q: list[float], *, drawn: bool, samples: int = 4000) -> np.ndarray:
    """First tokens under MSS with one child, drawn from q or always q's most likely token."""
    log_p, distribution = torch.tensor(p).log(), torch.tensor(q)
    counts = np.zeros(len(p))
    for seed in range(samples):
        noise = gumbel_noise(samples + seed, 0, len(q)) if drawn else torch.zeros(len(q))
        child = int((distribution.log() + noise).argmax())
        tree = TokenTree((0, child), (-1, 0), {0: distribution})
        accepted = accept(MSS, MergedDraft.single(tree), lambda _node, _path: log_p, seed=seed, position=1)
        counts[accepted.token_ids[0]] += 1
    return counts


def test_a_biased_rule_is_noticed() -> None:
    """With p = (.5, .5), q = (.9, .1) and a fixed most likely child, P(token 0) would be .5 / .9 = .556."""
    biased = first_tokens([0.5, 0.5], [0.9, 0.1], drawn=False)
    assert chi_square_p_value(biased, np.array([0.5, 0.5])) < ALPHA
    assert biased[0] / biased.sum() == pytest.approx(0.5 / 0.9, abs=0.03)
    exact = first_tokens([0.5, 0.5], [0.9, 0.1], drawn=True)
    assert chi_square_p_value(exact, np.array([0.5, 0.5])) > ALPHA


def test_pruning_draws_is_noticed() -> None:
    """Dropping drawn children that look unlikely is the mistake that best-first growth must not make."""
    log_p, q = torch.tensor([0.4, 0.6]).log(), torch.tensor([0.7, 0.3])
    counts = np.zeros(2)
    for seed in range(4000):
        child = int((q.log() + gumbel_noise(4000 + seed, 0, 2)).argmax())
        tree = TokenTree((0, child), (-1, 0), {0: q}) if q[child] > 0.5 else TokenTree.root_only(0)
        accepted = accept(MSS, MergedDraft.single(tree), lambda _node, _path: log_p, seed=seed, position=1)
        counts[accepted.token_ids[0]] += 1
    assert chi_square_p_value(counts, np.array([0.4, 0.6])) < ALPHA


def test_children_that_were_not_drawn_do_not_bias_mss() -> None:
    """A top-k tree under MSS is treated as the naive rule treats it."""
    tops = static_drafter(AcceptanceRule.NAIVE, SMALL[:1], (2, 2))
    counts = joint_counts(MSS, LLM, tops, 2, 2000)
    assert chi_square_p_value(counts, exact_joint(LLM, 2)) > ALPHA
