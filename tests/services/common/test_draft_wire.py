from __future__ import annotations

from collections.abc import Callable

import pytest

from protos import speculator_pb2
from services.common.draft_wire import request_from_wire, request_to_wire, response_from_wire, response_to_wire
from services.common.drafting import AdvanceSequence, DraftRequest, OpenSequence, SpeculateRequest, SpeculateResponse
from speculation.children import ChildSelection
from speculation.sampling import SamplingParams
from speculation.tree import InvalidTree, TokenTree

VOCAB = 8


@pytest.mark.parametrize("selection", ChildSelection)
def test_a_request_arrives_as_it_was_sent(selection: ChildSelection) -> None:
    params = SamplingParams(logit_bias={3: 0.5}, temperature=0.75, top_k=4, seed=1 << 63)
    request = SpeculateRequest(
        7,
        [AdvanceSequence(1, [2, 3]), AdvanceSequence(2, [4])],
        [2, 5],
        [OpenSequence(3, [1, 2, 3], params, prompt_length=2)],
        [DraftRequest(1, 6, 3, (2, 1), selection, 0.25, lookup_only=True), DraftRequest(3, 1, 1)],
    )
    sent = speculator_pb2.SpeculateRequest.FromString(request_to_wire(request).SerializeToString())
    assert request_from_wire(sent) == request


def test_an_answer_arrives_as_it_was_sent() -> None:
    tree = TokenTree((1, 2, 3), (-1, 0, 0), source="ssm", confidences=(0.0, -0.5, -1.0))
    answer = SpeculateResponse(
        7, {4: [TokenTree.root_only(2)], 1: [tree, TokenTree.root_only(1)], 5: []}, [9], work_seconds=0.5
    )
    sent = speculator_pb2.SpeculateResponse.FromString(response_to_wire(answer).SerializeToString())
    received = response_from_wire(sent, VOCAB)
    assert (received.step, received.unknown_sequence_ids, received.work_seconds) == (7, [9], 0.5)
    assert {
        key: [(t.token_ids, t.parents, t.source, t.confidences) for t in trees]
        for key, trees in received.drafts.items()
    } == {
        4: [((2,), (-1,), "", ())],
        1: [((1, 2, 3), (-1, 0, 0), "ssm", (0.0, -0.5, -1.0)), ((1,), (-1,), "", ())],
    }
    with pytest.raises(InvalidTree, match="the vocabulary has 3"):
        response_from_wire(sent, 3)


def test_trees_of_more_sequences_than_there_are() -> None:
    message = response_to_wire(SpeculateResponse(7, {1: [TokenTree.root_only(1)]}))
    message.sequence_ids.append(2)
    with pytest.raises(InvalidTree, match="1 trees for 2 sequences"):
        response_from_wire(message, VOCAB)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda message: message.draft.selections.__setitem__(1, 0), r"selection is 0; it must be one of \[1, 2, 3\]"),
        (
            lambda message: message.draft.max_nodes.pop(),
            "draft has 2 sequence_ids, but 1 max_nodes; it needs one for each",
        ),
        (lambda message: message.draft.sequence_ids.append(3), "draft has 3 sequence_ids, but 2 max_nodes"),
        (lambda message: message.draft.widths.append(3), "draft.widths has 3 entries, but its counts are of 2"),
        (lambda message: message.advance.token_counts.append(0), "advance has 2 sequence_ids, but 3 token_counts"),
        (lambda message: message.advance.token_ids.pop(), "advance.token_ids has 2 entries, but its counts are of 3"),
    ],
)
def test_broken_requests_are_refused(spoil: Callable[[speculator_pb2.SpeculateRequest], object], error: str) -> None:
    advance = [AdvanceSequence(1, [2, 3]), AdvanceSequence(2, [4])]
    message = request_to_wire(
        SpeculateRequest(7, advance, draft=[DraftRequest(1, 6, 3, (2, 1)), DraftRequest(2, 1, 1)])
    )
    assert len(request_from_wire(message).draft) == 2
    spoil(message)
    with pytest.raises(ValueError, match=error):
        request_from_wire(message)
