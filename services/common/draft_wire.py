"""Drafting on the wire: the messages of a Speculate stream, for both of its ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

from protos import speculator_pb2
from services.common.drafting import (
    AdvanceSequence,
    DraftRequest,
    OpenSequence,
    SpeculateRequest,
    SpeculateResponse,
)
from services.common.tree_wire import sampling_from_wire, sampling_to_wire, trees_from_wire, trees_to_wire
from speculation.children import ChildSelection
from speculation.tree import InvalidTree, TokenTree

_SELECTIONS = {
    ChildSelection.TOP: speculator_pb2.CHILD_SELECTION_TOP,
    ChildSelection.SHARED_NOISE: speculator_pb2.CHILD_SELECTION_SHARED_NOISE,
    ChildSelection.SAMPLED: speculator_pb2.CHILD_SELECTION_SAMPLED,
}
_SELECTIONS_FROM_WIRE = {number: selection for selection, number in _SELECTIONS.items()}


def request_to_wire(request: SpeculateRequest) -> speculator_pb2.SpeculateRequest:
    message = speculator_pb2.SpeculateRequest(step=request.step, close=request.close)
    if request.advance:
        ids, tokens = zip(*request.advance, strict=True)
        message.advance.sequence_ids.extend(ids)
        message.advance.token_counts.extend(map(len, tokens))
        message.advance.token_ids.extend(chain.from_iterable(tokens))
    for opened in request.open:
        message.open.add(
            sequence_id=opened.sequence_id,
            token_ids=opened.token_ids,
            sampling=sampling_to_wire(opened.sampling),
            prompt_length=opened.prompt_length,
        )
    if request.draft:
        draft = message.draft
        ids, nodes, depths, widths, selections, floors, lookups = zip(*request.draft, strict=True)
        draft.sequence_ids.extend(ids)
        draft.max_nodes.extend(nodes)
        draft.max_depths.extend(depths)
        draft.selections.extend([_SELECTIONS[selection] for selection in selections])
        draft.min_confidences.extend(floors)
        draft.lookup_only.extend(lookups)
        draft.width_counts.extend(map(len, widths))
        draft.widths.extend(chain.from_iterable(widths))
    return message


def request_from_wire(message: speculator_pb2.SpeculateRequest) -> SpeculateRequest:
    """Raises ValueError for columns that differ, sampling parameters out of bounds and an unknown selection."""
    return SpeculateRequest(
        message.step,
        _advances(message.advance),
        list(message.close),
        [_opened(opened) for opened in message.open],
        _drafts(message.draft),
    )


def _advances(message: speculator_pb2.AdvanceSequences) -> list[AdvanceSequence]:
    _check_columns("advance", len(message.sequence_ids), token_counts=message.token_counts)
    tokens = _parts("advance.token_ids", message.token_ids, message.token_counts)
    return [AdvanceSequence(*each) for each in zip(message.sequence_ids, tokens, strict=True)]


def _opened(message: speculator_pb2.OpenSequence) -> OpenSequence:
    return OpenSequence(
        message.sequence_id,
        list(message.token_ids),
        sampling_from_wire(message.sampling),
        message.prompt_length,
    )


def _drafts(message: speculator_pb2.DraftRequests) -> list[DraftRequest]:
    _check_columns(
        "draft",
        len(message.sequence_ids),
        max_nodes=message.max_nodes,
        max_depths=message.max_depths,
        selections=message.selections,
        min_confidences=message.min_confidences,
        lookup_only=message.lookup_only,
        width_counts=message.width_counts,
    )
    if unknown := set(message.selections) - _SELECTIONS_FROM_WIRE.keys():
        raise ValueError(f"selection is {min(unknown)}; it must be one of {sorted(_SELECTIONS_FROM_WIRE)}")
    columns = zip(
        message.sequence_ids,
        message.max_nodes,
        message.max_depths,
        map(tuple, _parts("draft.widths", message.widths, message.width_counts)),
        map(_SELECTIONS_FROM_WIRE.__getitem__, message.selections),
        message.min_confidences,
        message.lookup_only,
        strict=True,
    )
    return [DraftRequest(*each) for each in columns]


def response_to_wire(response: SpeculateResponse) -> speculator_pb2.SpeculateResponse:
    drafts = response.drafts
    return speculator_pb2.SpeculateResponse(
        step=response.step,
        unknown_sequence_ids=response.unknown_sequence_ids,
        work_seconds=response.work_seconds,
        sequence_ids=[sequence_id for sequence_id, trees in drafts.items() for _ in trees],
        trees=trees_to_wire(list(chain.from_iterable(drafts.values()))),
    )


def response_from_wire(message: speculator_pb2.SpeculateResponse, vocab_size: int) -> SpeculateResponse:
    """Raises InvalidTree for a tree that breaks an invariant or does not fit the vocabulary."""
    trees = trees_from_wire(message.trees, vocab_size)
    if len(message.sequence_ids) != len(trees):
        raise InvalidTree(f"{len(trees)} trees for {len(message.sequence_ids)} sequences")
    drafts: dict[int, list[TokenTree]] = {}
    for sequence_id, tree in zip(message.sequence_ids, trees, strict=True):
        drafts.setdefault(sequence_id, []).append(tree)
    return SpeculateResponse(message.step, drafts, list(message.unknown_sequence_ids), message.work_seconds)


def _check_columns(field: str, sequences: int, **columns: Sequence[object]) -> None:
    for name, column in columns.items():
        if len(column) != sequences:
            raise ValueError(f"{field} has {sequences} sequence_ids, but {len(column)} {name}; it needs one for each")


def _parts(field: str, values: Iterable[int], counts: Sequence[int]) -> list[list[int]]:
    """Raises ValueError when they are not as many as the counts say."""
    rest, ends = list(values), list(accumulate(counts))
    if (counted := ends[-1] if ends else 0) != len(rest):
        raise ValueError(f"{field} has {len(rest)} entries, but its counts are of {counted}")
    return [rest[end - count : end] for count, end in zip(counts, ends, strict=True)]
