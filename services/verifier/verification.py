"""From a step's logits to the accepted paths.

On a CPU each node is processed when acceptance comes to it. On another device the tokens behind all nodes of all trees
are chosen there, and come back in one copy; multi-step speculative sampling, whose draws are sequential, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch

from services.verifier.runner import StepLogits
from services.verifier.sequence import Sequence
from speculation.acceptance import AcceptanceRule, Accepted, accept, accept_chosen, choose_behind_all, resolve_rule
from speculation.merge import MergedDraft
from speculation.tree import TokenTree


def verify(
    sequences: Items[Sequence],
    drafts: Mapping[int, MergedDraft],
    logits: StepLogits,
    sampling_rule: AcceptanceRule,
    *,
    all_nodes: bool,
) -> dict[int, Accepted]:
    """The accepted path of every tree and one more token, by sequence id.

    all_nodes: choose behind every node before anything is read back. The outcome is the same.
    """
    chosen = _choose(sequences, drafts, logits, sampling_rule, all_nodes)
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
    all_nodes: bool,
) -> dict[int, list[int]]:
    """The token behind each node, by sequence id, of the sequences for which all are chosen at once; one copy back."""
    plain = any(sequence.pipeline.plain_argmax for sequence in sequences)
    argmax = _argmax(logits.trees) if plain else logits.trees.new_empty(0, dtype=torch.int64)
    parts: dict[int, torch.Tensor] = {}
    for sequence in sequences:
        tree, start = drafts[sequence.id].tree, logits.tree_starts[sequence.id]
        if sequence.pipeline.plain_argmax:
            parts[sequence.id] = argmax[start : start + len(tree)]
        elif all_nodes and resolve_rule(sampling_rule, sequence.request.sampling) is not AcceptanceRule.MSS:
            parts[sequence.id] = _choose_processed(sequence, tree, logits.trees[start : start + len(tree)])
    if not parts:
        return {}
    tokens = torch.cat(list(parts.values())).cpu().split([len(part) for part in parts.values()])
    return {sequence_id: own.tolist() for sequence_id, own in zip(parts, tokens, strict=True)}


def _argmax(rows: torch.Tensor) -> torch.Tensor:
    """int64 [n] of float32 [n, vocab]. On a CPU by NumPy, which takes a tenth of the time."""
    return torch.from_numpy(rows.numpy().argmax(-1)) if rows.device.type == "cpu" else rows.argmax(-1)


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
