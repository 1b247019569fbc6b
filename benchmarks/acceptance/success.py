"""Table 1: how often the LLM's token is among the k candidates of a draft, at every position of the LLM's own text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.decoding import sampling
from benchmarks.acceptance.lines import WIDTHS
from benchmarks.acceptance.runners import Tokens
from runtime.batch import Segment
from runtime.kv_cache import CachedSequence
from services.speculator.drafter import Drafter
from services.speculator.session import DraftOrder
from speculation.acceptance import AcceptanceRule
from speculation.logits import LogitsPipeline
from speculation.merge import merge_trees
from speculation.tree import TokenTree

STREAM = 1
MOST = max(WIDTHS)

Draws = tuple[torch.Tensor, torch.Tensor]
"""One SSM's draws at n positions: the distribution of the first, float [n, vocab], and the tokens, int64 [n, draws]."""


@dataclass(frozen=True)
class SuccessRow:
    """Candidates of one SSM, or of a set. each: k of every SSM, else k in all."""

    of: str
    sources: tuple[str, ...]
    each: bool = False


def success_rows(sets: Mapping[str, Sequence[str]]) -> tuple[SuccessRow, ...]:
    """Every SSM alone, then its set, of every set."""
    rows: list[SuccessRow] = []
    for of, names in sets.items():
        rows.extend(SuccessRow(of, (name,)) for name in names)
        if len(names) > 1:
            rows.extend(SuccessRow(of, tuple(names), each) for each in (False, True))
    return tuple(rows)


@dataclass
class Tally:
    """hits: by row float64 [prompts, widths], summed over positions: expected successes with k candidates."""

    prompts: int
    hits: dict[SuccessRow, np.ndarray] = field(default_factory=dict)

    def add(self, row: SuccessRow, width: int, prompts: Sequence[int], successes: Sequence[float]) -> None:
        counts = self.hits.setdefault(row, np.zeros((self.prompts, len(WIDTHS))))
        counts[prompts, WIDTHS.index(width)] += successes


def measure_success(
    bench: Bench,
    rows: Sequence[SuccessRow],
    rule: AcceptanceRule,
    prompts: Sequence[Tokens],
    texts: Sequence[Tokens],
    seed: int,
) -> dict[SuccessRow, np.ndarray]:
    """Successes float64 [prompts, widths] of every row, over the positions of the prompts' texts.

    Under MSS what is added up is the probability that one of the draws is accepted, given the draws.
    """
    names = [name for row in rows for name in row.sources]
    sources = {name: bench.models[name] for name in names}
    distributions = _llm_distributions(bench, prompts, texts) if rule is AcceptanceRule.MSS else []
    tally = Tally(len(prompts))
    _open(sources.values(), rule, prompts, seed)
    for position in range(max(map(len, texts))):
        alive = [index for index, text in enumerate(texts) if position < len(text)]
        orders = [DraftOrder((STREAM, index), MOST, 1, (MOST,), rule.selection) for index in alive]
        trees = {name: _draft(source, orders) for name, source in sources.items()}
        if rule is AcceptanceRule.MSS:
            p = torch.stack([distributions[index][position] for index in alive])
            _tally_draws(tally, rows, alive, p, {name: _draws(drawn) for name, drawn in trees.items()})
        else:
            _tally_candidates(tally, rows, alive, [texts[index][position] for index in alive], trees)
        for source in sources.values():
            for index in alive:
                source.advance((STREAM, index), [texts[index][position]])
    for source in sources.values():
        for index in range(len(prompts)):
            source.close((STREAM, index))
    return tally.hits


def acceptance_of_draws(p: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    """Probability that one of the first i draws is accepted, float64 [n, draws], given the draws (SpecInfer, alg. 2).

    p: the LLM's distributions, float64 [n, vocab]. The draws of each SSM are without replacement, and tested one SSM
    after the other: x is accepted with min(1, p(x) / q(x)), and after a rejection
        p <- norm(max(p - q, 0)),  q <- norm(q without x).
    """
    rejected = torch.ones(len(p), dtype=torch.float64)
    accepted: list[torch.Tensor] = []
    for distribution, tokens in draws:
        left = distribution.to(torch.float64, copy=True)
        for token in tokens.T[:, :, None]:
            q = left / left.sum(-1, keepdim=True)
            rejected = rejected * (1 - p.gather(1, token) / q.gather(1, token)).clamp(min=0)[:, 0]
            accepted.append(1 - rejected)
            residual = (p - q).clamp_(min=0)
            mass = residual.sum(-1, keepdim=True)
            # Without a residual p equals q, and the draw was accepted for certain.
            p = torch.where(mass > 0, residual / mass.clamp(min=torch.finfo(torch.float64).tiny), p)
            left.scatter_(1, token, 0.0)
    return torch.stack(accepted, 1)


def _draft(source: Drafter, orders: Sequence[DraftOrder]) -> list[TokenTree]:
    trees = source.draft(orders)
    return [trees[order.key] for order in orders]


def _open(sources: Iterable[Drafter], rule: AcceptanceRule, prompts: Sequence[Tokens], seed: int) -> None:
    for source in sources:
        for index, prompt in enumerate(prompts):
            source.open((STREAM, index), prompt, len(prompt), sampling(rule, seed, index))
        while source.work_ahead():
            pass


def _llm_distributions(bench: Bench, prompts: Sequence[Tokens], texts: Sequence[Tokens]) -> list[torch.Tensor]:
    """The distribution of each token of each text, float64 [tokens, vocab]."""
    model, cache = bench.llm.model, bench.llm.cache
    distributions = []
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        pipeline = LogitsPipeline(sampling(AcceptanceRule.MSS, 0, index), prompt, model.config.vocab_size, model.device)
        tokens, sequence = [*prompt, *text[:-1]], CachedSequence()
        cache.reserve(sequence, len(tokens))
        wanted = range(len(prompt) - 1, len(tokens))
        logits = model.step([Segment.chain(sequence, tokens, 0)], wanted, cache)
        cache.release(sequence)
        log_probs = pipeline.process_many(logits)
        distributions.append(log_probs.cpu().double().softmax(-1))
    return distributions


def _tally_candidates(
    tally: Tally,
    rows: Sequence[SuccessRow],
    alive: Sequence[int],
    wanted: Sequence[int],
    trees: Mapping[str, Sequence[TokenTree]],
) -> None:
    for row in rows:
        own = list(zip(*(trees[name] for name in row.sources), strict=True))
        for width in WIDTHS:
            successes = [token in _candidates(row, drafted, width) for drafted, token in zip(own, wanted, strict=True)]
            tally.add(row, width, alive, successes)


def _candidates(row: SuccessRow, trees: Sequence[TokenTree], width: int) -> tuple[int, ...]:
    """Tokens below the root; k in all means what merging to k nodes leaves of k candidates of each SSM."""
    levels = [tree.select(range(min(len(tree), 1 + width))) for tree in trees]
    if row.each or len(levels) == 1:
        return tuple(token for level in levels for token in level.token_ids[1:])
    return merge_trees(levels, width).tree.token_ids[1:]


def _draws(trees: Sequence[TokenTree]) -> Draws:
    drawn = torch.tensor([tree.token_ids[1:] for tree in trees])
    return torch.stack([tree.distributions[0].cpu() for tree in trees]), drawn


def _tally_draws(
    tally: Tally, rows: Sequence[SuccessRow], alive: Sequence[int], p: torch.Tensor, draws: Mapping[str, Draws]
) -> None:
    for row in rows:
        own = [draws[name] for name in row.sources]
        if len(own) == 1:
            accepted = acceptance_of_draws(p, own)
            for index, width in enumerate(WIDTHS):
                tally.add(row, width, alive, accepted[:, index].tolist())
            continue
        for width in WIDTHS:
            counts = [width] * len(own) if row.each else deal(width, len(own))
            taken = [(q, tokens[:, :count]) for (q, tokens), count in zip(own, counts, strict=True) if count]
            tally.add(row, width, alive, acceptance_of_draws(p, taken)[:, -1].tolist())


def deal(draws: int, hands: int) -> list[int]:
    """How many of `draws` each of `hands` SSMs gets when they are dealt in turn."""
    return [draws // hands + (index < draws % hands) for index in range(hands)]
