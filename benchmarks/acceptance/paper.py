"""Figures of SpecInfer (Miao et al., ASPLOS 2024; arXiv 2305.09781) for LLaMA-7B with LLaMA-68M."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speculation.acceptance import AcceptanceRule


@dataclass(frozen=True)
class Span:
    """The lowest and the highest figure over the paper's five sets of prompts."""

    low: float
    high: float


# Table 2: tokens per LLM step of Alpaca, chatgpt-prompts, WebQA, chatbot prompts and PIQA, by width 1..5.
_GREEDY = (
    (2.95, 3.07, 3.21, 3.33, 3.43),
    (2.58, 3.24, 3.46, 3.59, 3.69),
    (2.27, 2.69, 2.86, 2.98, 3.07),
    (2.73, 3.40, 3.62, 3.79, 3.91),
    (2.18, 2.80, 2.97, 3.10, 3.21),
)
_STOCHASTIC = (
    (1.79, 2.11, 2.26, 2.32, 2.38),
    (1.69, 1.99, 2.15, 2.23, 2.28),
    (1.64, 1.93, 2.08, 2.15, 2.21),
    (1.72, 2.05, 2.19, 2.28, 2.29),
    (1.67, 1.93, 2.08, 2.15, 2.21),
)

# Table 1: success rates by number of candidates, of which the first and the last are quoted here.
_GREEDY_SUCCESS = {1: Span(0.62, 0.70), 5: Span(0.82, 0.89)}
_STOCHASTIC_SUCCESS = {1: Span(0.52, 0.57), 5: Span(0.96, 0.97)}

# Table 3.
MSS_OVER_NAIVE = Span(1.26, 1.28)


def tokens_per_step(rule: AcceptanceRule) -> list[Span]:
    """By width, greedy or stochastic; the paper samples with MSS."""
    rows: Sequence[Sequence[float]] = _GREEDY if rule is AcceptanceRule.GREEDY else _STOCHASTIC
    return [Span(min(column), max(column)) for column in zip(*rows, strict=True)]


def success(rule: AcceptanceRule) -> dict[int, Span]:
    """By number of candidates."""
    return _GREEDY_SUCCESS if rule is AcceptanceRule.GREEDY else _STOCHASTIC_SUCCESS
