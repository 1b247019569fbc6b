"""Tiny Markov chains in the place of language models: the next token depends on the last one alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from speculation.acceptance import AcceptanceRule, Accepted, accept
from speculation.calibration import Calibration
from speculation.children import ChildPolicy
from speculation.expansion import BestFirstExpansion, Expansion, StaticExpansion
from speculation.merge import MergedDraft, merge_trees
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree

Drafter = Callable[[int, int, int], MergedDraft]
"""(root token, position, seed) -> draft."""


def markov_model(seed: int, vocab_size: int = 4, scale: float = 1.5) -> torch.Tensor:
    """Random log-probabilities float32 [vocab, vocab]: row = last token, column = next token."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(vocab_size, vocab_size, generator=generator) * scale).log_softmax(-1)


def perturbed(model: torch.Tensor, seed: int, scale: float = 0.7) -> torch.Tensor:
    """A worse model of the same text."""
    generator = torch.Generator().manual_seed(seed)
    return (model + torch.randn(model.shape, generator=generator) * scale).log_softmax(-1)


def grow(expansion: Expansion, model: torch.Tensor) -> TokenTree:
    """Let a builder draft from a Markov model."""
    while frontier := expansion.frontier():
        expansion.extend(model[[expansion.token_ids[node] for node in frontier]])
    return expansion.build()


def static_drafter(rule: AcceptanceRule, models: Sequence[torch.Tensor], widths: tuple[int, ...]) -> Drafter:
    """Merges one static tree of each model."""

    def draft(root: int, position: int, seed: int) -> MergedDraft:
        policies = [ChildPolicy(rule.selection, seed, stream) for stream in range(len(models))]
        builders = [StaticExpansion(root, position, policy, widths=widths, max_nodes=20) for policy in policies]
        return merge_trees([grow(builder, model) for builder, model in zip(builders, models, strict=True)])

    return draft


def best_first_drafter(
    rule: AcceptanceRule,
    models: Sequence[torch.Tensor],
    max_nodes: int,
    calibrations: Sequence[Calibration] = (Calibration(),) * 3,
) -> Drafter:
    """Merges one best-first tree of each model and cuts the result to 3/2 of a tree."""

    def draft(root: int, position: int, seed: int) -> MergedDraft:
        trees = []
        params = SamplingParams(temperature=0 if rule is AcceptanceRule.GREEDY else 1, seed=seed)
        for stream, (model, calibration) in enumerate(zip(models, calibrations, strict=False)):
            policy = ChildPolicy.calibrated(rule.selection, params, stream, calibration)
            builder = BestFirstExpansion(
                root, position, policy, max_nodes=max_nodes, max_depth=3, beam=2, min_confidence=0.05
            )
            trees.append(grow(builder, model))
        return merge_trees(trees, max_nodes * 3 // 2)

    return draft


def no_draft(root: int, position: int, seed: int) -> MergedDraft:
    """Plain decoding."""
    del position, seed
    return MergedDraft.root_only(root)


def step(rule: AcceptanceRule, llm: torch.Tensor, draft: MergedDraft, seed: int, position: int) -> Accepted:
    """One verification step of a Markov LLM."""
    tree = draft.tree
    return accept(rule, draft, lambda node, _path: llm[tree.token_ids[node]], seed=seed, position=position)


def generate(rule: AcceptanceRule, llm: torch.Tensor, drafter: Drafter, *, seed: int, length: int) -> tuple[int, ...]:
    """The first `length` tokens behind token 0."""
    tokens = [0]
    while len(tokens) <= length:
        draft = drafter(tokens[-1], len(tokens), seed)
        tokens.extend(step(rule, llm, draft, seed, len(tokens)).token_ids)
    return tuple(tokens[1 : length + 1])


def exact_joint(llm: torch.Tensor, length: int) -> np.ndarray:
    """Probability of every text of `length` tokens behind token 0: float64 [vocab] * length."""
    p: np.ndarray = llm.double().softmax(-1).numpy()
    joint: np.ndarray = p[0]
    for _ in range(length - 1):
        joint = joint[..., None] * p
    return joint
