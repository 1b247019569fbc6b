"""Which nodes of a draft the LLM's own choice confirms, and which token follows them.

Every rule leaves the output's distribution exactly as the LLM's. Knows nothing of logits processing: it is given the
log-probabilities that a node's token is to be chosen from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from speculation.children import ChildSelection
from speculation.merge import MergedDraft
from speculation.noise import gumbel_keys, gumbel_noise, gumbel_noise_of, uniform
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree

# (node of the merged tree, tokens below the root down to it) -> log-probabilities [vocab] behind it.
LogProbsOf = Callable[[int, tuple[int, ...]], torch.Tensor]

_MSS_STREAM = 1


class AcceptanceRule(StrEnum):
    """How draft tokens are confirmed.

    GREEDY: follow the child that is the LLM's argmax.
    SHARED_NOISE: the token at a position is argmax(log p + noise), with noise that is a function of seed and position;
        the draft ranks its children with the same noise. The text depends on the seed alone.
    MSS: multi-step speculative sampling (SpecInfer, algorithm 2), for children drawn without replacement.
    NAIVE: sample from the LLM, keep the token's node if the draft has it (the paper's baseline). Same text as
        SHARED_NOISE; only the draft ranks its children without the noise.
    """

    GREEDY = "greedy"
    SHARED_NOISE = "shared-noise"
    MSS = "mss"
    NAIVE = "naive"

    @property
    def selection(self) -> ChildSelection:
        """How a draft for this rule chooses its children."""
        return _SELECTIONS[self]


_SELECTIONS = {
    AcceptanceRule.GREEDY: ChildSelection.TOP,
    AcceptanceRule.SHARED_NOISE: ChildSelection.SHARED_NOISE,
    AcceptanceRule.MSS: ChildSelection.SAMPLED,
    AcceptanceRule.NAIVE: ChildSelection.TOP,
}


def resolve_rule(sampling_rule: AcceptanceRule, params: SamplingParams) -> AcceptanceRule:
    """GREEDY for a request of temperature 0, else the rule that is configured for sampling.

    Raises:
        ValueError: the rule for sampling is GREEDY, which samples nothing.
    """
    if sampling_rule is AcceptanceRule.GREEDY:
        others = ", ".join(rule for rule in AcceptanceRule if rule is not AcceptanceRule.GREEDY)
        raise ValueError(f"acceptance rule for sampling is {sampling_rule}; it must be one of {others}")
    return AcceptanceRule.GREEDY if params.greedy else sampling_rule


@dataclass(frozen=True)
class Accepted:
    """One step's output of a sequence.

    nodes: accepted nodes of the merged tree, below the root, in path order.
    token_ids: their tokens and one more, the LLM's own behind the last of them; len(nodes) + 1.
    """

    nodes: tuple[int, ...]
    token_ids: tuple[int, ...]


def accept(rule: AcceptanceRule, draft: MergedDraft, log_probs_of: LogProbsOf, *, seed: int, position: int) -> Accepted:
    """Accept the longest path of the draft that the rule confirms, and one token more.

    log_probs_of: called for the visited nodes only, root first; float [vocab], normalised, -inf where filtered (for
        GREEDY any scores).
    position: index in the sequence of the token behind the root.
    """
    if rule is AcceptanceRule.MSS:
        return _accept_mss(draft, log_probs_of, seed, position)

    def choose(node: int, path: tuple[int, ...]) -> int:
        scores = log_probs_of(node, path)
        if rule is AcceptanceRule.GREEDY:
            return int(scores.argmax())
        return int(choose_tokens(scores[None], seed, [position + len(path)]))

    return _follow(draft.tree, choose)


def accept_chosen(tree: TokenTree, chosen: Sequence[int]) -> Accepted:
    """Follow the LLM's choices, of which chosen[i] is the token behind node i of the tree."""
    if len(chosen) == 1:  # plain decoding, which many sequences at once do
        return Accepted((), (chosen[0],))
    return _follow(tree, lambda node, _path: chosen[node])


def choose_behind_all(
    tree: TokenTree, log_probs: torch.Tensor, *, greedy: bool, seed: int, position: int
) -> torch.Tensor:
    """The token behind every node, int64 [nodes] on the device of log_probs, for `accept_chosen`; nothing is read back.

    They are those that `accept` chooses at the nodes it visits, by every rule but MSS.

    log_probs: float [nodes, vocab], of each node behind its own path. position: of the token behind the root.
    """
    if greedy:
        return log_probs.argmax(-1)
    return choose_tokens(log_probs, seed, [position + depth for depth in tree.depths()])


def draw_behind(
    logits: torch.Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> torch.Tensor:
    """`choose_tokens` behind nodes of many sequences, whose logits need no more than a temperature; one each.

    logits: float32 [n, vocab]. Returns int64 [len(rows)] on the same device; nothing is read back.
    """
    device = logits.device
    scores = logits[torch.tensor(rows, device=device)]
    scale = torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
    # As LogitsPipeline does it, to the bit.
    scores = torch.where(scale == 1, scores, (scores - scores.amax(-1, keepdim=True)) / scale)
    keys = [gumbel_keys(seed, [position])[0] for seed, position in zip(seeds, positions, strict=True)]
    noise = gumbel_noise_of(torch.tensor(keys, dtype=torch.int64, device=device), logits.shape[-1])
    return noise.add_(scores.log_softmax(-1)).argmax(-1)


def choose_tokens(log_probs: torch.Tensor, seed: int, positions: Sequence[int]) -> torch.Tensor:
    """Draw the token of each position by the Gumbel-max trick: argmax(log p + g(seed, position)).

    log_probs: float [n, vocab], one row for each of the positions. Returns int64 [n] on the same device.
    """
    noise = gumbel_noise(seed, positions, log_probs.shape[-1], log_probs.device)
    return noise.add_(log_probs).argmax(-1)


def _follow(tree: TokenTree, choose: Callable[[int, tuple[int, ...]], int]) -> Accepted:
    nodes: list[int] = []
    token_ids: list[int] = []
    below = {edge: node for node, edge in enumerate(zip(tree.parents, tree.token_ids, strict=True))}
    node: int | None = 0
    while node is not None:
        token_ids.append(choose(node, tuple(token_ids)))
        node = below.get((node, token_ids[-1]))
        if node is not None:
            nodes.append(node)
    return Accepted(tuple(nodes), tuple(token_ids))


def _accept_mss(draft: MergedDraft, log_probs_of: LogProbsOf, seed: int, position: int) -> Accepted:
    """SpecInfer, algorithm 2, with draws without replacement and several component trees.

    A token that was not drawn but chosen from what the draws left over is the LLM's own, as in NAIVE, and is followed
    too if the tree has it. Children that were not drawn are therefore never tested, which would bias the output.
    """
    components = draft.components
    children = [component.children() for component in components]
    # Each component's node of the path so far; None where it does not contain the path.
    here: list[int | None] = [0 for _ in components]

    def descend(component: int, node: int | None, token_id: int) -> int | None:
        below = [] if node is None else children[component][node]
        return next((child for child in below if components[component].token_ids[child] == token_id), None)

    def choose(node: int, path: tuple[int, ...]) -> int:
        if path:
            here[:] = [descend(component, own, path[-1]) for component, own in enumerate(here)]
        draws = [
            (q, [component.token_ids[child] for child in children[index][own]])
            for index, (component, own) in enumerate(zip(components, here, strict=True))
            if own is not None and (q := component.distributions.get(own)) is not None
        ]
        return _test_draws(log_probs_of(node, path), draws, seed, position + len(path))

    return _follow(draft.tree, choose)


def _test_draws(
    log_probs: torch.Tensor, draws: Sequence[tuple[torch.Tensor, Sequence[int]]], seed: int, position: int
) -> int:
    """A token with the distribution p = exp(log_probs), one of the drawn ones with the largest probability possible.

    draws: for each component the distribution float [vocab] of its first draw, and the tokens that it drew without
        replacement, independently of the other components and of this seed's noise. Every drawn token x is accepted
        with probability min(1, p(x) / q(x)); after a rejection
            p <- norm(max(p - q, 0)),  q <- norm(q without x)
        hold for the next one. When all are rejected the token is drawn from p.
    """
    uniforms = iter(uniform(seed, position, _MSS_STREAM, sum(len(drawn) for _, drawn in draws)))
    p = log_probs.double().cpu().exp_()
    p /= p.sum()
    for distribution, drawn in draws:
        left = distribution.to("cpu", torch.float64, copy=True)
        for token_id in drawn:
            q = left / left.sum()
            residual = (p - q).clamp_(min=0)
            mass = residual.sum().item()
            # u < p/q accepts; without a residual p equals q up to rounding, and so does p/q one
            if next(uniforms) * q[token_id].item() < p[token_id].item() or mass == 0:
                return token_id
            p = residual / mass
            left[token_id] = 0
    return int(choose_tokens(p.log()[None], seed, [position]))
