"""What a speculator demands of what it is told."""

from __future__ import annotations

from collections.abc import Sequence

from services.common.drafting import DraftRequest
from services.speculator.session import DraftOrder
from speculation.suffix_index import SEPARATOR
from speculation.tree import MAX_NODES

MAX_DEPTH = 64


class InvalidMessage(ValueError):
    """A request that breaks the protocol; the message names the field, the value and what is allowed."""


def draft_order(stream: int, wish: DraftRequest) -> DraftOrder:
    """Raises InvalidMessage for budgets out of bounds."""
    if not 1 <= wish.max_nodes < MAX_NODES:
        raise InvalidMessage(f"max_nodes is {wish.max_nodes}; it must be in 1..{MAX_NODES - 1}")
    if not 1 <= wish.max_depth <= MAX_DEPTH:
        raise InvalidMessage(f"max_depth is {wish.max_depth}; it must be in 1..{MAX_DEPTH}")
    if not 0 <= wish.min_confidence <= 1:
        raise InvalidMessage(f"min_confidence is {wish.min_confidence}; it must be in 0..1")
    if 0 in wish.widths:
        raise InvalidMessage(f"widths are {list(wish.widths)}; each must be at least 1")
    return DraftOrder(
        key=(stream, wish.sequence_id),
        nodes=wish.max_nodes,
        depth=wish.max_depth,
        widths=wish.widths,
        selection=wish.selection,
        min_confidence=wish.min_confidence,
        lookup_only=wish.lookup_only,
    )


def check_tokens(field: str, token_ids: Sequence[int], vocab_size: int | None) -> None:
    """Raise InvalidMessage for an empty list or a token outside the vocabulary.

    vocab_size: None when there is no model; any token may then be the verifier's but the one that separates texts.
    """
    vocab_size = SEPARATOR if vocab_size is None else vocab_size
    if not token_ids:
        raise InvalidMessage(f"{field} is empty; it needs at least one token")
    if (largest := max(token_ids)) >= vocab_size:
        raise InvalidMessage(f"{field} has token {largest}; the vocabulary has {vocab_size}")
