"""From a step's logits to the accepted paths."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice

import torch

from kernels.token_draw.native import draw_tokens
from runtime.step_model import StepModel
from services.verifier.runner import StepLogits
from services.verifier.sequence import Sequence
from speculation.acceptance import (
    AcceptanceRule,
    Accepted,
    accept,
    accept_chosen,
    choose_behind_all,
    draw_behind,
    resolve_rule,
)
from speculation.merge import MergedDraft
from speculation.tree import TokenTree


class Choosing(enum.Enum):
    """Where the LLM's tokens behind the nodes are chosen. What is chosen is the same.

    VISITED: at each node when acceptance comes to it. NATIVE: so too, but where the token is a plain argmax or draw,
    behind all nodes of all sequences in one call. AT_ONCE: all on the device, to come back in one copy. Multi-step
    speculative sampling, whose draws are sequential, visits the nodes everywhere.
    """

    VISITED = enum.auto()
    NATIVE = enum.auto()
    AT_ONCE = enum.auto()

    @classmethod
    def of(cls, model: StepModel) -> Choosing:
        if model.device.type != "cpu":
            return cls.AT_ONCE
        return cls.NATIVE if model.backend.name == "native" else cls.VISITED


def verify(
    sequences: Items[Sequence],
    drafts: Mapping[int, MergedDraft],
    logits: StepLogits,
    sampling_rule: AcceptanceRule,
    choosing: Choosing,
) -> dict[int, Accepted]:
    """The accepted path of every tree and one more token, by sequence id."""
    chosen = _choose(sequences, drafts, logits, sampling_rule, choosing)
    accepted: dict[int, Accepted] = {}
    for sequence in sequences:
        draft = drafts[sequence.id]
        if (tokens := chosen.get(sequence.id)) is not None:
            accepted[sequence.id] = accept_chosen(draft.tree, tokens)
        else:
            rows = logits.trees[logits.tree_starts[sequence.id] :]
            accepted[sequence.id] = _accept_visited(sequence, draft, rows, sampling_rule)
    return accepted


def _choose(
    sequences: Items[Sequence],
    drafts: Mapping[int, MergedDraft],
    logits: StepLogits,
    sampling_rule: AcceptanceRule,
    choosing: Choosing,
) -> dict[int, list[int]]:
    """The token behind each node, by sequence id, of the sequences for which all are chosen at once."""
    if choosing is Choosing.AT_ONCE:
        return _choose_on_device(sequences, drafts, logits, sampling_rule)
    chosen: dict[int, list[int]] = {}
    drawn: list[tuple[Sequence, TokenTree]] = []
    argmax: list[int] | None = None
    for sequence in sequences:
        tree, start = drafts[sequence.id].tree, logits.tree_starts[sequence.id]
        if sequence.pipeline.plain_argmax:
            if argmax is None:
                # torch's argmax takes ten times as long as numpy's
                argmax = logits.trees.numpy().argmax(-1).tolist() if logits.argmax is None else logits.argmax
            chosen[sequence.id] = argmax[start : start + len(tree)]
        elif choosing is Choosing.NATIVE and _is_plain_draw(sequence, sampling_rule):
            drawn.append((sequence, tree))
    if drawn:
        draws = _Draws.behind(drawn, logits)
        tokens = iter(draw_tokens(logits.trees, draws.rows, draws.temperatures, draws.seeds, draws.positions))
        for sequence_id, count in zip(draws.sequence_ids, draws.counts, strict=True):
            chosen[sequence_id] = list(islice(tokens, count))
    return chosen


def _choose_on_device(
    sequences: Items[Sequence],
    drafts: Mapping[int, MergedDraft],
    logits: StepLogits,
    sampling_rule: AcceptanceRule,
) -> dict[int, list[int]]:
    parts: list[torch.Tensor] = []  # what comes back, one behind the other
    places: dict[int, range] = {}  # of each sequence's tokens there
    chosen = 0
    if any(sequence.pipeline.plain_argmax for sequence in sequences):
        parts.append(logits.trees.argmax(-1))  # of all rows: to leave some out takes longer
        chosen = len(logits.trees)
    drawn: list[tuple[Sequence, TokenTree]] = []
    for sequence in sequences:
        tree, start = drafts[sequence.id].tree, logits.tree_starts[sequence.id]
        if sequence.pipeline.plain_argmax:
            places[sequence.id] = range(start, start + len(tree))
        elif _is_plain_draw(sequence, sampling_rule):
            drawn.append((sequence, tree))
        elif resolve_rule(sampling_rule, sequence.request.sampling) is not AcceptanceRule.MSS:
            parts.append(_choose_processed(sequence, tree, logits.trees[start : start + len(tree)]))
            places[sequence.id] = range(chosen, chosen := chosen + len(tree))
    if drawn:
        draws = _Draws.behind(drawn, logits)
        parts.append(draw_behind(logits.trees, draws.rows, draws.temperatures, draws.seeds, draws.positions))
        for sequence_id, count in zip(draws.sequence_ids, draws.counts, strict=True):
            places[sequence_id] = range(chosen, chosen := chosen + count)
    tokens = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist() if parts else []
    return {sequence_id: tokens[place.start : place.stop] for sequence_id, place in places.items()}


def _is_plain_draw(sequence: Sequence, sampling_rule: AcceptanceRule) -> bool:
    rule = resolve_rule(sampling_rule, sequence.request.sampling)
    return rule is not AcceptanceRule.MSS and sequence.pipeline.plain_temperature is not None


@dataclass(frozen=True)
class _Draws:
    """Behind every node of sequences whose logits need no more than a scale, one sequence behind the other.

    counts: nodes of each. The others are of each node.
    """

    sequence_ids: list[int]
    counts: list[int]
    rows: list[int]
    temperatures: list[float]
    seeds: list[int]
    positions: list[int]

    @classmethod
    def behind(cls, drawn: Items[tuple[Sequence, TokenTree]], logits: StepLogits) -> _Draws:
        draws = cls([], [], [], [], [], [])
        for sequence, tree in drawn:
            start, count, temperature = logits.tree_starts[sequence.id], len(tree), sequence.pipeline.plain_temperature
            assert temperature is not None
            draws.sequence_ids.append(sequence.id)
            draws.counts.append(count)
            draws.rows.extend(range(start, start + count))
            draws.temperatures.extend([temperature] * count)
            draws.seeds.extend([sequence.request.sampling.seed] * count)
            draws.positions.extend([len(sequence.tokens) + depth for depth in tree.depths()])
        return draws


def _choose_processed(sequence: Sequence, tree: TokenTree, rows: torch.Tensor) -> torch.Tensor:
    params, position = sequence.request.sampling, len(sequence.tokens)
    paths = [[tree.token_ids[node] for node in tree.path(end)] for end in range(len(tree))]
    log_probs = sequence.pipeline.process_many(rows, paths)
    return choose_behind_all(tree, log_probs, greedy=params.greedy, seed=params.seed, position=position)


def _accept_visited(
    sequence: Sequence, draft: MergedDraft, rows: torch.Tensor, sampling_rule: AcceptanceRule
) -> Accepted:
    params = sequence.request.sampling
    return accept(
        resolve_rule(sampling_rule, params),
        draft,
        lambda node, path: sequence.pipeline.process(rows[node], path),
        seed=params.seed,
        position=len(sequence.tokens),
    )
