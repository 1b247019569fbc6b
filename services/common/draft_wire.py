"""Drafting on the wire: the messages of a Speculate stream, for both of its ends."""

from __future__ import annotations

from protos import speculator_pb2
from services.common.drafting import (
    AdvanceSequence,
    DraftRequest,
    OpenSequence,
    SpeculateRequest,
    SpeculateResponse,
)
from services.common.tree_wire import sampling_from_wire, sampling_to_wire, tree_from_wire, tree_to_wire
from speculation.children import ChildSelection

_SELECTIONS = {
    ChildSelection.TOP: speculator_pb2.CHILD_SELECTION_TOP,
    ChildSelection.SHARED_NOISE: speculator_pb2.CHILD_SELECTION_SHARED_NOISE,
    ChildSelection.SAMPLED: speculator_pb2.CHILD_SELECTION_SAMPLED,
}
_SELECTIONS_FROM_WIRE = {number: selection for selection, number in _SELECTIONS.items()}


def request_to_wire(request: SpeculateRequest) -> speculator_pb2.SpeculateRequest:
    message = speculator_pb2.SpeculateRequest(step=request.step, close=request.close)
    for advance in request.advance:
        message.advance.add(sequence_id=advance.sequence_id, token_ids=advance.token_ids)
    for opened in request.open:
        message.open.add(
            sequence_id=opened.sequence_id,
            token_ids=opened.token_ids,
            sampling=sampling_to_wire(opened.sampling),
            prompt_length=opened.prompt_length,
        )
    for draft in request.draft:
        message.draft.add(
            sequence_id=draft.sequence_id,
            max_nodes=draft.max_nodes,
            max_depth=draft.max_depth,
            widths=draft.widths,
            selection=_SELECTIONS[draft.selection],
            min_confidence=draft.min_confidence,
            lookup_only=draft.lookup_only,
        )
    return message


def request_from_wire(message: speculator_pb2.SpeculateRequest) -> SpeculateRequest:
    """Raises ValueError for sampling parameters out of bounds and an unknown selection."""
    return SpeculateRequest(
        message.step,
        [AdvanceSequence(advance.sequence_id, list(advance.token_ids)) for advance in message.advance],
        list(message.close),
        [_opened(opened) for opened in message.open],
        [_draft(draft) for draft in message.draft],
    )


def _opened(message: speculator_pb2.OpenSequence) -> OpenSequence:
    return OpenSequence(
        message.sequence_id,
        list(message.token_ids),
        sampling_from_wire(message.sampling),
        message.prompt_length,
    )


def _draft(message: speculator_pb2.DraftRequest) -> DraftRequest:
    if (selection := _SELECTIONS_FROM_WIRE.get(message.selection)) is None:
        raise ValueError(f"selection is {message.selection}; it must be one of {sorted(_SELECTIONS_FROM_WIRE)}")
    return DraftRequest(
        message.sequence_id,
        message.max_nodes,
        message.max_depth,
        tuple(message.widths),
        selection,
        message.min_confidence,
        message.lookup_only,
    )


def response_to_wire(response: SpeculateResponse) -> speculator_pb2.SpeculateResponse:
    message = speculator_pb2.SpeculateResponse(
        step=response.step,
        unknown_sequence_ids=response.unknown_sequence_ids,
        work_seconds=response.work_seconds,
    )
    for sequence_id, trees in response.drafts.items():
        message.drafts.add(sequence_id=sequence_id, trees=[tree_to_wire(tree) for tree in trees])
    return message


def response_from_wire(message: speculator_pb2.SpeculateResponse, vocab_size: int) -> SpeculateResponse:
    """Raises InvalidTree for a tree that breaks an invariant or does not fit the vocabulary."""
    drafts = {draft.sequence_id: [tree_from_wire(tree, vocab_size) for tree in draft.trees] for draft in message.drafts}
    return SpeculateResponse(message.step, drafts, list(message.unknown_sequence_ids), message.work_seconds)
