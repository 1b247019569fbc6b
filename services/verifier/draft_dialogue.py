"""What one speculator is told and what it answers, however the messages reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from protos import speculator_pb2
from services.verifier import wire
from services.verifier.drafts import DraftOrder
from services.verifier.sequence import Sequence as RunningSequence
from speculation.tree import TokenTree


class DraftDialogue:
    """Remembers what the speculator knows: each message has what is new to it. For the engine's thread alone."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._known: dict[int, int] = {}  # sequence id -> how many of its tokens the speculator has
        self._ended: dict[int, list[int]] = {}  # sequence id -> those of its tokens that the speculator does not have
        self._orders: dict[int, DraftOrder] = {}

    def opening(self, sequences: Sequence[RunningSequence]) -> speculator_pb2.SpeculateRequest | None:
        """Tells it of sequences that will want drafts soon; None when it knows them all."""
        new = [sequence for sequence in sequences if sequence.id not in self._known]
        self._known.update({sequence.id: len(sequence.tokens) for sequence in new})
        return wire.opening(new) if new else None

    def order(self, step: int, orders: Sequence[DraftOrder]) -> speculator_pb2.SpeculateRequest:
        """Asks for the drafts of a step, and tells what has ended."""
        self._orders = {order.sequence.id: order for order in orders}
        message = wire.speculate_request(step, orders, self._known)
        self._add_endings(message)
        for order in orders:
            self._known[order.sequence.id] = len(order.sequence.tokens)
        return message

    def drafts(self, response: speculator_pb2.SpeculateResponse) -> Mapping[int, list[TokenTree]]:
        """The trees of an answer to the newest order.

        Raises:
            InvalidTree: a tree is malformed, is for another state, or exceeds its budget.
        """
        for sequence_id in response.unknown_sequence_ids:
            self._known.pop(sequence_id, None)
        return wire.read_drafts(response, self._orders, self._vocab_size)

    def forget(self, sequence: RunningSequence) -> None:
        """The sequence has ended; what is said next tells the speculator."""
        if (known := self._known.pop(sequence.id, None)) is not None:
            self._ended[sequence.id] = sequence.tokens[known:]

    def endings(self) -> speculator_pb2.SpeculateRequest | None:
        """Tells what has ended and was not told; None when all was."""
        if not self._ended:
            return None
        message = speculator_pb2.SpeculateRequest()
        self._add_endings(message)
        return message

    def _add_endings(self, message: speculator_pb2.SpeculateRequest) -> None:
        wire.add_endings(message, self._ended)
        self._ended = {}
