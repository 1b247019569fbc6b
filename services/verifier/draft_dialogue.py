"""What one speculator is told and what it answers, however that reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.common.drafting import AdvanceSequence, DraftRequest, OpenSequence, SpeculateRequest, SpeculateResponse
from services.verifier.drafts import DraftOrder
from services.verifier.sequence import Sequence as RunningSequence
from speculation.tree import InvalidTree, TokenTree


class DraftDialogue:
    """Remembers what the speculator knows: each message has what is new to it. For the engine's thread alone."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._known: dict[int, int] = {}  # sequence id -> how many of its tokens the speculator has
        self._ended: dict[int, list[int]] = {}  # sequence id -> those of its tokens that the speculator does not have
        self._orders: dict[int, DraftOrder] = {}

    def opening(self, sequences: Sequence[RunningSequence]) -> SpeculateRequest | None:
        """Tells it of sequences that will want drafts soon; None when it knows them all."""
        new = [sequence for sequence in sequences if sequence.id not in self._known]
        self._known.update({sequence.id: len(sequence.tokens) for sequence in new})
        return SpeculateRequest(open=[_opened(sequence) for sequence in new]) if new else None

    def order(self, step: int, orders: Sequence[DraftOrder]) -> SpeculateRequest:
        """Asks for the drafts of a step, and tells what has ended."""
        self._orders = {order.sequence.id: order for order in orders}
        request = SpeculateRequest(step, draft=[_wish(order) for order in orders])
        for sequence in [order.sequence for order in orders]:
            if (known := self._known.get(sequence.id)) is None:
                request.open.append(_opened(sequence))
            elif fresh := sequence.tokens[known:]:
                request.advance.append(AdvanceSequence(sequence.id, fresh))
            self._known[sequence.id] = len(sequence.tokens)
        self._add_endings(request)
        return request

    def drafts(self, response: SpeculateResponse) -> Mapping[int, list[TokenTree]]:
        """The trees of an answer to the newest order, those with at least one draft token.

        Raises:
            InvalidTree: a tree was not asked for, is for another state, exceeds its budget or leaves the vocabulary.
        """
        for sequence_id in response.unknown_sequence_ids:
            self._known.pop(sequence_id, None)
        drafts: dict[int, list[TokenTree]] = {}
        for sequence_id, trees in response.drafts.items():
            if (order := self._orders.get(sequence_id)) is None:
                raise InvalidTree(f"draft for sequence {sequence_id}, which was not asked for")
            for tree in trees:
                self._check(tree, order)
                if len(tree) > 1:
                    drafts.setdefault(sequence_id, []).append(tree)
        return drafts

    def forget(self, sequence: RunningSequence) -> None:
        """The sequence has ended; what is said next tells the speculator."""
        if (known := self._known.pop(sequence.id, None)) is not None:
            self._ended[sequence.id] = sequence.tokens[known:]

    def endings(self) -> SpeculateRequest | None:
        """Tells what has ended and was not told; None when all was."""
        if not self._ended:
            return None
        request = SpeculateRequest()
        self._add_endings(request)
        return request

    def _add_endings(self, request: SpeculateRequest) -> None:
        ended, self._ended = self._ended, {}
        request.advance += [AdvanceSequence(sequence_id, tokens) for sequence_id, tokens in ended.items() if tokens]
        request.close += ended

    def _check(self, tree: TokenTree, order: DraftOrder) -> None:
        if tree.token_ids[0] != order.sequence.tokens[-1]:
            raise InvalidTree(f"root is token {tree.token_ids[0]}, the sequence ends with {order.sequence.tokens[-1]}")
        nodes = len(tree) - 1
        if nodes > order.nodes or (nodes > order.depth and max(tree.depths()) > order.depth):
            raise InvalidTree(
                f"{nodes} nodes of depth {max(tree.depths())}; asked for {order.nodes} of depth {order.depth}"
            )
        if (largest := max(tree.token_ids)) >= self._vocab_size:
            raise InvalidTree(f"token {largest} is outside the vocabulary 0..{self._vocab_size - 1}")


def _opened(sequence: RunningSequence) -> OpenSequence:
    request = sequence.request
    return OpenSequence(sequence.id, list(sequence.tokens), request.sampling, len(request.prompt))


def _wish(order: DraftOrder) -> DraftRequest:
    return DraftRequest(
        order.sequence.id,
        order.nodes,
        order.depth,
        order.widths,
        order.selection,
        order.floor,
        lookup_only=not order.models,
    )
