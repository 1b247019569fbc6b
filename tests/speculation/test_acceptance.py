from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.acceptance import AcceptanceRule, Accepted, accept, accept_chosen, choose_tokens, resolve_rule
from speculation.calibration import Calibration
from speculation.children import ChildPolicy, ChildSelection
from speculation.expansion import StaticExpansion
from speculation.merge import MergedDraft, merge_trees
from speculation.noise import gumbel_noise
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree
from tests.speculation.models import (
    best_first_drafter,
    generate,
    grow,
    markov_model,
    no_draft,
    perturbed,
    static_drafter,
    step,
)
from tests.speculation.trees import confident_trees, token_path, token_paths, token_trees

GREEDY, SHARED_NOISE, MSS, NAIVE = AcceptanceRule


@pytest.mark.parametrize("rule", [GREEDY, SHARED_NOISE, NAIVE])
@given(st.data(), st.integers(0, 2**64 - 1), st.integers(0, 10))
def test_the_draft_does_not_change_the_text(
    rule: AcceptanceRule, data: st.DataObject, seed: int, model_seed: int
) -> None:
    """Any drafts, the wildest too, and cut anywhere: the text is that of plain decoding."""
    llm = markov_model(model_seed, 5)

    def any_draft(root: int, _position: int, _seed: int) -> MergedDraft:
        trees = [data.draw(token_trees(root=root)), data.draw(confident_trees(root=root))]
        return merge_trees(trees, data.draw(st.none() | st.integers(0, 20)))

    assert generate(rule, llm, any_draft, seed=seed, length=6) == generate(rule, llm, no_draft, seed=seed, length=6)


@pytest.mark.parametrize("seed", range(5))
def test_the_text_depends_on_the_seed_alone(seed: int) -> None:
    llm = markov_model(1, 6)
    small = [perturbed(llm, 2), markov_model(3, 6)]
    texts = {
        generate(rule, llm, drafter, seed=seed, length=20)
        for rule in (SHARED_NOISE, NAIVE)
        for drafter in (
            no_draft,
            static_drafter(rule, small[:1], (1, 1, 3, 1)),
            static_drafter(rule, small, (2, 2)),
            best_first_drafter(rule, small[1:], 6),
        )
    }
    assert len(texts) == 1
    # Without a draft, MSS chooses with the same noise.
    assert texts == {generate(MSS, llm, no_draft, seed=seed, length=20)}


@pytest.mark.parametrize("rule", [GREEDY, SHARED_NOISE])
def test_calibrations_change_the_drafts_and_not_the_text(rule: AcceptanceRule) -> None:
    llm = markov_model(1, 6)
    small = [perturbed(llm, 2), perturbed(llm, 3)]
    sharp, soft = Calibration(greedy_temperature=0.2, disagreement=0.1), Calibration(4.0, 3.0)
    calibrations = [(sharp, sharp), (sharp, soft), (soft, sharp), (soft, soft)]
    drafters = [best_first_drafter(rule, small, 6, pair) for pair in calibrations]
    assert len({frozenset(token_paths(drafter(0, 1, 5).tree)) for drafter in drafters}) == 4
    for seed in range(5):
        texts = {generate(rule, llm, drafter, seed=seed, length=20) for drafter in (no_draft, *drafters)}
        assert len(texts) == 1


@given(token_trees(), st.integers(0, 100))
def test_visits_the_accepted_path_only(tree: TokenTree, seed: int) -> None:
    visited: list[int] = []

    def log_probs_of(node: int, path: tuple[int, ...]) -> torch.Tensor:
        assert path == token_path(draft.tree, node)
        visited.append(node)
        return gumbel_noise(seed, node, 5)

    draft = MergedDraft.single(tree)
    accepted = accept(GREEDY, draft, log_probs_of, seed=0, position=9)
    assert visited == [0, *accepted.nodes]
    assert len(accepted.token_ids) == len(accepted.nodes) + 1
    last = accepted.nodes[-1] if accepted.nodes else 0
    assert token_path(draft.tree, last) == accepted.token_ids[:-1]
    children = [draft.tree.token_ids[child] for child in draft.tree.children()[last]]
    assert accepted.token_ids[-1] not in children, "the path must be the longest"
    argmax = [int(gumbel_noise(seed, node, 5).argmax()) for node in range(len(draft.tree))]
    assert accept_chosen(draft.tree, argmax) == accepted


def test_by_hand() -> None:
    tree = TokenTree((7, 1, 2, 3, 4), (-1, 0, 1, 0, 3))
    assert accept_chosen(tree, [3, 0, 0, 4, 9]) == Accepted((3, 4), (3, 4, 9))
    assert accept_chosen(tree, [1, 5, 0, 0, 0]) == Accepted((1,), (1, 5))
    assert accept_chosen(tree, [9, 0, 0, 0, 0]) == Accepted((), (9,))


def test_choose_tokens_is_the_rule() -> None:
    llm = markov_model(1, 7)
    chosen = choose_tokens(llm, 5, range(10, 17))
    for row, position in enumerate(range(10, 17)):
        draft = MergedDraft.root_only(row)
        assert step(SHARED_NOISE, llm, draft, 5, position).token_ids == (int(chosen[row]),)


def accepted_share(rule: AcceptanceRule, p: torch.Tensor, q: torch.Tensor, width: int, samples: int) -> float:
    """Share of steps that accept one of `width` children drafted from q where the LLM has p; logs, float32 [vocab]."""
    hits = 0
    for seed in range(samples):
        builder = StaticExpansion(0, 1, ChildPolicy(rule.selection, seed), widths=(width,), max_nodes=width)
        draft = MergedDraft.single(grow(builder, q.expand(len(q), -1)))
        hits += len(accept(rule, draft, lambda _node, _path: p, seed=seed, position=1).nodes)
    return hits / samples


def test_acceptance_probabilities() -> None:
    llm = markov_model(8, 12)
    p, q = llm[0], perturbed(llm, 9)[0]
    tv = 0.5 * (p.exp() - q.exp()).abs().sum().item()
    assert 0.1 < tv < 0.5
    samples = 1500
    error = 4 / math.sqrt(4 * samples)  # four standard deviations at most
    # One child: 1 - TV (Leviathan et al., theorem 3.5) and at least (1 - TV) / (1 + TV) (shared Gumbel noise).
    assert accepted_share(MSS, p, q, 1, samples) == pytest.approx(1 - tv, abs=error)
    shared = accepted_share(SHARED_NOISE, p, q, 1, samples)
    assert (1 - tv) / (1 + tv) - error < shared < 1 - tv + error
    naive = accepted_share(NAIVE, p, q, 1, samples)
    assert naive == pytest.approx(p.exp()[int(q.argmax())].item(), abs=error)
    # More children: never worse; the whole vocabulary: always.
    assert accepted_share(MSS, p, q, 3, samples) > 1 - tv
    assert accepted_share(SHARED_NOISE, p, q, 3, samples) > shared
    assert accepted_share(SHARED_NOISE, p, q, 12, 50) == 1


def test_equal_models_always_agree() -> None:
    q = markov_model(3, 9)[0]
    for rule in (MSS, SHARED_NOISE):
        assert accepted_share(rule, q, q, 1, 300) == 1


def test_mss_with_a_certain_draft() -> None:
    """Whatever q leaves without mass after its draws must not end in nan."""
    q = torch.tensor([0.0, 1.0, 0.0])
    tree = TokenTree((0, 1), (-1, 0), {0: q})
    p = torch.tensor([0.5, 0.0, 0.5]).log()
    tokens = {
        accept(MSS, MergedDraft.single(tree), lambda _node, _path: p, seed=seed, position=1).token_ids
        for seed in range(40)
    }
    assert tokens == {(0,), (2,)}
    assert torch.equal(q, torch.tensor([0.0, 1.0, 0.0])), "the draft's distribution stays as it was"


def test_rules() -> None:
    assert resolve_rule(MSS, SamplingParams(temperature=0)) is GREEDY
    assert resolve_rule(MSS, SamplingParams(temperature=0.1)) is MSS
    with pytest.raises(ValueError, match="must be one of shared-noise, mss, naive"):
        resolve_rule(GREEDY, SamplingParams())
    assert [rule.selection for rule in AcceptanceRule] == [
        ChildSelection.TOP,
        ChildSelection.SHARED_NOISE,
        ChildSelection.SAMPLED,
        ChildSelection.TOP,
    ]
