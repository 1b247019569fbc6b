from __future__ import annotations

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
    answer = SpeculateResponse(7, {1: [tree, TokenTree.root_only(1)], 4: []}, [9], work_seconds=0.5)
    sent = speculator_pb2.SpeculateResponse.FromString(response_to_wire(answer).SerializeToString())
    received = response_from_wire(sent, VOCAB)
    assert (received.step, received.unknown_sequence_ids, received.work_seconds) == (7, [9], 0.5)
    assert {
        key: [(t.token_ids, t.parents, t.source, t.confidences) for t in trees]
        for key, trees in received.drafts.items()
    } == {
        1: [((1, 2, 3), (-1, 0, 0), "ssm", (0.0, -0.5, -1.0)), ((1,), (-1,), "", ())],
        4: [],
    }
    with pytest.raises(InvalidTree, match="the vocabulary has 3"):
        response_from_wire(sent, 3)


def test_a_way_of_choosing_children_that_nobody_knows() -> None:
    message = speculator_pb2.SpeculateRequest()
    message.draft.add(sequence_id=1, max_nodes=2, max_depth=1)
    with pytest.raises(ValueError, match=r"selection is 0; it must be one of \[1, 2, 3\]"):
        request_from_wire(message)
