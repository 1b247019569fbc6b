"""The contract of growing many trees by a level: what is wanted of them, what they are, and what makes them larger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.blocks import check_tensor


@dataclass(frozen=True, eq=False)
class TreeRules:
    """What is wanted of each of S trees. Sequences without a tree have 0 nodes or levels.

    nodes, depth: int64 [S], most nodes below the root, and levels.
    floor: float64 [S], least log-probability of a path behind which a tree goes on.
    temperature: float64 [S], above 0; divides the logits.
    scale: float64 [S], above 0; divides the scores of which confidences are made.
    noise_keys: int64 [S, levels], what the Gumbel noise behind the root and behind each level follows from; noisy:
        int64 [S], 0 for a tree whose scores have none. Both are None where no tree's have.
    beam: most nodes of a level that get children.

    Raises:
        ValueError: another shape or type, noise_keys without noisy or the other way round, a beam below 1.
    """

    nodes: torch.Tensor
    depth: torch.Tensor
    floor: torch.Tensor
    temperature: torch.Tensor
    scale: torch.Tensor
    noise_keys: torch.Tensor | None
    noisy: torch.Tensor | None
    beam: int

    def __post_init__(self) -> None:
        trees = len(self.nodes)
        for name in ("nodes", "depth"):
            check_tensor(name, getattr(self, name), (trees,), torch.int64)
        for name in ("floor", "temperature", "scale"):
            check_tensor(name, getattr(self, name), (trees,), torch.float64)
        if (self.noise_keys is None) != (self.noisy is None):
            raise ValueError("noise_keys and noisy come together; one of them is None")
        if self.noise_keys is not None and self.noisy is not None:
            check_tensor("noise_keys", self.noise_keys, (trees, None), torch.int64)
            check_tensor("noisy", self.noisy, (trees,), torch.int64)
        if self.beam < 1:
            raise ValueError(f"beam is {self.beam}; it must be at least 1")


@dataclass(frozen=True, eq=False)
class CachePlaces:
    """Where the rows of S trees go: slot s of a tree is entry lengths + s of its sequence, see `AttentionBatch`.

    lengths: int64 [S], entries before the root. block_tables: int32 [S, blocks], with a block for every entry that a
    tree writes. scratch_slot: of the cache, where rows without a node write.

    Raises:
        ValueError: another shape or type.
    """

    lengths: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    scratch_slot: int

    def __post_init__(self) -> None:
        check_tensor("lengths", self.lengths, (None,), torch.int64)
        check_tensor("block_tables", self.block_tables, (len(self.lengths), None), torch.int32)


@dataclass(frozen=True, eq=False)
class FrontierRows:
    """Nodes whose next-token distribution is wanted, W of each of S trees, as rows of a forward pass.

    confidences: float64 [S, W], log-probabilities of the paths, at most 0; -inf where there is no node. Such a row has
        token 0 at position 0, sees nothing and writes to the scratch slot.
    slots: int64 [S, W], the node's number among those that were or are wanted, of which each level has W; the root's
        is 0.
    masks: int64 [S, W, words], bit j % 64 of word j // 64 is set where slot j is the node's own or an ancestor's.
    token_ids, positions, cache_slots: int64 [S * W]; prefix_lengths: int32 [S * W].
    """

    confidences: torch.Tensor
    slots: torch.Tensor
    masks: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    cache_slots: torch.Tensor
    prefix_lengths: torch.Tensor


@dataclass(frozen=True, eq=False)
class Trees:
    """S trees of at most `kept` nodes below their roots, the most probable first, and their frontier.

    confidences: float64 [S, kept], at most 0; -inf for no node, whose other numbers mean nothing.
    token_ids, parents, slots: int64 [S, kept]; the slot of the parent and, where it is or was wanted, of the node, else
        -1.
    level: how many levels have been grown.
    """

    confidences: torch.Tensor
    token_ids: torch.Tensor
    parents: torch.Tensor
    slots: torch.Tensor
    frontier: FrontierRows
    level: int

    @classmethod
    def roots(cls, trees: int, kept: int, words: int, device: torch.device) -> Trees:
        """Nothing but roots, which are the frontier; the rows of that one are unused."""
        nothing = torch.zeros(trees, kept, dtype=torch.int64, device=device)
        root, masks = nothing.new_zeros(trees, 1), nothing.new_zeros(trees, 1, words)
        masks[:, :, 0] = 1
        row = root[:, 0]
        frontier = FrontierRows(root.double(), root, masks, row, row, row, row.int())
        return cls(nothing.double() - torch.inf, nothing, nothing, nothing - 1, frontier, 0)


class GrowLevel(Protocol):
    """Add the frontier's children, of which each tree keeps its most probable nodes, and find the next frontier.

    logits: float32 [S, W, vocab] behind the nodes of the frontier. With x the logits of a node and g the noise of its
    level, child t of a path of log-probability c has log-probability c + log softmax((x / temperature + g) / scale)_t.
    Of equally probable nodes the one that stood first stands first, a parent before its child. The next frontier is the
    first `beam` nodes of the new level that are not below the floor.

    Nothing is read back and nothing that was given is written to.

    Raises:
        ValueError: a shape or type that does not fit, or sizes that the implementation does not take.
    """

    def __call__(self, logits: torch.Tensor, rules: TreeRules, places: CachePlaces, trees: Trees) -> Trees: ...
