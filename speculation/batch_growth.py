"""Best-first growth of many trees at once, in tensors of fixed sizes: nothing is read back before the trees are grown,
so that a CUDA graph can capture all levels with the forward passes between them.

The rules are those of `expansion.BestFirstExpansion` for children that are not drawn, but for the order of nodes that
are equally probable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from speculation.noise import gumbel_noise_of

_WORD = 64


@dataclass(frozen=True)
class GrowthRules:
    """What is wanted of each of S trees.

    nodes, depth: int64 [S], most nodes below the root, and levels; 0 for no tree.
    floor: float64 [S], least log-probability of a path behind which a tree goes on.
    temperature: float32 [S], above 0; divides the logits.
    scale: float64 [S]; divides the scores of which confidences are made.
    noise_keys: int64 [S, levels], `noise.gumbel_keys` of the positions behind the root; noisy: bool [S], whose scores
        have that noise. None where no tree's have.
    """

    nodes: torch.Tensor
    depth: torch.Tensor
    floor: torch.Tensor
    temperature: torch.Tensor
    scale: torch.Tensor
    noise_keys: torch.Tensor | None = None
    noisy: torch.Tensor | None = None


@dataclass(frozen=True)
class Frontier:
    """Nodes whose next-token distribution is wanted, all of one depth: at most W of each of S trees.

    active: bool [S, W], whether there is such a node; what stands elsewhere means nothing.
    slots: int64 [S, W], its number among those that were or are wanted, of which each level has W; the root's is 0.
    token_ids: int64 [S, W]. confidences: float64 [S, W].
    masks: int64 [S, W, words], bit j of a node's words is set where slot j is its own or an ancestor's.
    """

    active: torch.Tensor
    slots: torch.Tensor
    token_ids: torch.Tensor
    confidences: torch.Tensor
    masks: torch.Tensor


class BatchGrowth:
    """Trees under construction. All tensors are on the rules' device.

    most_nodes: at least the rules' largest. beam: most nodes of a level that get children. words: of 64 bits, that
    hold a bit for each slot.

    confidences: float64 [S, most_nodes], of the nodes below the root, falling; -inf for none. token_ids, parents and
        slots: int64 [S, most_nodes]; the slot of the parent and, where it is wanted itself, of the node, else -1.
    frontier: what `extend` takes the logits of; before the first call the root's.
    """

    def __init__(self, rules: GrowthRules, most_nodes: int, beam: int, words: int) -> None:
        self._rules = rules
        self._width = min(beam, most_nodes)
        self._level = 0
        trees, device = len(rules.nodes), rules.nodes.device
        self._numbers = torch.arange(most_nodes, device=device)
        self._words = torch.arange(words, device=device)
        nothing = torch.zeros(trees, most_nodes, dtype=torch.int64, device=device)
        self.confidences = torch.full((trees, most_nodes), -torch.inf, dtype=torch.float64, device=device)
        self.token_ids, self.parents, self.slots = nothing, nothing, nothing - 1
        root = torch.zeros(trees, 1, dtype=torch.int64, device=device)
        self.frontier = Frontier(rules.depth[:, None] > 0, root, root, root.double(), self._bits(root))

    def extend(self, logits: torch.Tensor) -> None:
        """Add the frontier's children, of which each tree keeps the most probable nodes, and find the next frontier.

        logits: float32 [S, W, vocab] behind the nodes of the frontier.
        """
        above, kept = self.frontier, self.confidences.shape[1]
        token_ids, chances = self._children(logits, min(kept, logits.shape[2]))
        # Rounding must not make a child surer than its parent.
        confidences = above.confidences[:, :, None] + chances.clamp(max=0)
        confidences = confidences.masked_fill(~above.active[:, :, None], -torch.inf).flatten(1)
        rows = torch.arange(logits.shape[1], device=logits.device)[None, :, None].expand_as(token_ids)
        parents = above.slots[:, :, None].expand_as(token_ids)
        # Stable: of equally probable nodes the one that was there first, a parent before its child.
        ranked = torch.cat((self.confidences, confidences), 1).sort(dim=1, descending=True, stable=True)
        places = ranked.indices[:, :kept]
        self.confidences = ranked.values[:, :kept].masked_fill(self._numbers >= self._rules.nodes[:, None], -torch.inf)
        self.token_ids = torch.cat((self.token_ids, token_ids.flatten(1)), 1).gather(1, places)
        self.parents = torch.cat((self.parents, parents.flatten(1)), 1).gather(1, places)
        unknown = torch.full_like(confidences, -1, dtype=torch.int64)
        self.slots = torch.cat((self.slots, unknown), 1).gather(1, places)
        row_of = torch.cat((torch.zeros_like(self.slots), rows.flatten(1)), 1).gather(1, places)
        self._level += 1
        self._advance(places >= kept, above.masks, row_of)

    def _children(self, logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities [S, W, width], the best first: `children.rank_children` behind the pipeline."""
        rules = self._rules
        scores = (logits - logits.amax(-1, keepdim=True)) / rules.temperature[:, None, None]
        scores = scores.log_softmax(-1)
        if rules.noise_keys is not None and rules.noisy is not None:
            noise = gumbel_noise_of(rules.noise_keys[:, self._level], logits.shape[2])
            scores = scores + (noise * rules.noisy[:, None])[:, None]
        scale = rules.scale[:, None, None].to(scores.dtype)
        best = scores.topk(width)
        return best.indices, (best.values / scale - (scores / scale).logsumexp(-1, keepdim=True)).double()

    def _advance(self, added: torch.Tensor, masks_above: torch.Tensor, row_of: torch.Tensor) -> None:
        """added: bool, which of the kept nodes are of the new level. row_of: place of each one's parent in the last."""
        rules, width = self._rules, self._width
        wanted = (self.confidences >= rules.floor[:, None]) & (self.confidences > -torch.inf)
        wanted &= added & (rules.depth[:, None] > self._level)
        order = wanted.cumsum(1) - 1
        wanted &= order < width
        self.slots = torch.where(wanted, 1 + (self._level - 1) * width + order, self.slots)
        found = torch.where(wanted, self._numbers, len(self._numbers)).sort(1)
        active, nodes = found.values[:, :width] < len(self._numbers), found.indices[:, :width]
        slots = self.slots.gather(1, nodes)
        rows = row_of.gather(1, nodes)[:, :, None].expand(-1, -1, len(self._words))
        self.frontier = Frontier(
            active,
            slots,
            self.token_ids.gather(1, nodes),
            self.confidences.gather(1, nodes),
            masks_above.gather(1, rows) | self._bits(slots),
        )

    def _bits(self, slots: torch.Tensor) -> torch.Tensor:
        """[S, W] -> [S, W, words]: the bit of each slot."""
        bits = torch.ones_like(slots).bitwise_left_shift(slots % _WORD)[:, :, None]
        return torch.where(slots[:, :, None] // _WORD == self._words, bits, 0)
