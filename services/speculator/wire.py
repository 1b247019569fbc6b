"""Protobuf to dataclasses and back."""

from __future__ import annotations

from protos import speculator_pb2
from services.speculator.session import DraftOrder
from speculation.expansion import ChildSelection
from speculation.suffix_index import SEPARATOR
from speculation.tree import MAX_NODES

MAX_DEPTH = 64

_SELECTIONS = {
    speculator_pb2.CHILD_SELECTION_TOP: ChildSelection.TOP,
    speculator_pb2.CHILD_SELECTION_SHARED_NOISE: ChildSelection.SHARED_NOISE,
    speculator_pb2.CHILD_SELECTION_SAMPLED: ChildSelection.SAMPLED,
}


class InvalidMessage(ValueError):
    """A request that breaks the protocol; the message names the field, the value and what is allowed."""


def draft_order(stream: int, message: speculator_pb2.DraftRequest) -> DraftOrder:
    """Raises InvalidMessage for budgets out of bounds or an unknown selection."""
    if not 1 <= message.max_nodes < MAX_NODES:
        raise InvalidMessage(f"max_nodes is {message.max_nodes}; it must be in 1..{MAX_NODES - 1}")
    if not 1 <= message.max_depth <= MAX_DEPTH:
        raise InvalidMessage(f"max_depth is {message.max_depth}; it must be in 1..{MAX_DEPTH}")
    if (selection := _SELECTIONS.get(message.selection)) is None:
        raise InvalidMessage(f"selection is {message.selection}; it must be one of {sorted(_SELECTIONS)}")
    if not 0 <= message.min_confidence <= 1:
        raise InvalidMessage(f"min_confidence is {message.min_confidence}; it must be in 0..1")
    if 0 in message.widths:
        raise InvalidMessage(f"widths are {list(message.widths)}; each must be at least 1")
    return DraftOrder(
        key=(stream, message.sequence_id),
        nodes=message.max_nodes,
        depth=message.max_depth,
        widths=tuple(message.widths),
        selection=selection,
        min_confidence=message.min_confidence,
        lookup_only=message.lookup_only,
    )


def check_tokens(field: str, token_ids: list[int], vocab_size: int | None) -> None:
    """Raise InvalidMessage for an empty list or a token outside the vocabulary.

    vocab_size: None when there is no model; any token may then be the verifier's but the one that separates texts.
    """
    vocab_size = SEPARATOR if vocab_size is None else vocab_size
    if not token_ids:
        raise InvalidMessage(f"{field} is empty; it needs at least one token")
    if (largest := max(token_ids)) >= vocab_size:
        raise InvalidMessage(f"{field} has token {largest}; the vocabulary has {vocab_size}")
