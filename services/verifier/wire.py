"""Protobuf to dataclasses and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import grpc

from protos import speculator_pb2, verifier_pb2
from services.common.lifecycle import Draining
from services.common.tree_wire import sampling_from_wire, sampling_to_wire, tree_from_wire
from services.verifier.drafts import DraftOrder
from services.verifier.request import (
    EngineStopped,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
    SequenceEvent,
    StepOutput,
    TokenLogprob,
)
from services.verifier.sequence import Sequence as RunningSequence
from speculation.expansion import ChildSelection
from speculation.tree import InvalidTree, TokenTree

_FINISH_REASONS = {
    None: verifier_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: verifier_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: verifier_pb2.FINISH_REASON_LENGTH,
}
# Log-probabilities can be large: a response that has so many is full.
_FULL_BYTES = 2**20
_SELECTIONS = {
    ChildSelection.TOP: speculator_pb2.CHILD_SELECTION_TOP,
    ChildSelection.SHARED_NOISE: speculator_pb2.CHILD_SELECTION_SHARED_NOISE,
    ChildSelection.SAMPLED: speculator_pb2.CHILD_SELECTION_SAMPLED,
}


def generation_request(message: verifier_pb2.BeginSequence) -> GenerationRequest:
    """Raises InvalidRequest for sampling parameters out of bounds."""
    try:
        sampling = sampling_from_wire(message.sampling)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return GenerationRequest(
        request_id=message.request_id,
        prompt=tuple(message.prompt_token_ids),
        generated=tuple(message.generated_token_ids),
        sampling=sampling,
        max_new_tokens=message.max_new_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
        prompt_logprobs=message.prompt_logprobs,
        speculative=message.speculative if message.HasField("speculative") else True,
    )


def generate_responses(events: Sequence[tuple[int, SequenceEvent]]) -> Iterator[verifier_pb2.GenerateResponse]:
    """Events by sequence id, in as few messages as are of a size that is quickly sent."""
    response, size = verifier_pb2.GenerateResponse(), 0
    for sequence_id, event in events:
        if event is None:
            response.admitted.append(sequence_id)
        elif isinstance(event, Exception):
            _add_failure(response, sequence_id, event)
        else:
            size += _add_output(response, sequence_id, event)
        if size > _FULL_BYTES:
            yield response
            response, size = verifier_pb2.GenerateResponse(), 0
    if response.ListFields():
        yield response


def is_last(event: SequenceEvent) -> bool:
    """Whether nothing comes of the sequence behind it."""
    return isinstance(event, Exception) or (event is not None and event.finish_reason is not None)


def _add_output(response: verifier_pb2.GenerateResponse, sequence_id: int, output: StepOutput) -> int:
    """Returns the bytes that its log-probabilities take: tokens alone are few."""
    added = response.outputs.add(
        sequence_id=sequence_id,
        token_ids=output.token_ids,
        logprobs=[_logprob(entry) for entry in output.logprobs],
        prompt_logprobs=[_logprob(entry) for entry in output.prompt_logprobs],
        finish_reason=_FINISH_REASONS[output.finish_reason],
        llm_steps=output.llm_steps,
    )
    return added.ByteSize() if output.logprobs or output.prompt_logprobs else 0


def _add_failure(response: verifier_pb2.GenerateResponse, sequence_id: int, error: Exception) -> None:
    failure = response.failures.add(sequence_id=sequence_id, message=str(error))
    match error:
        case InvalidRequest():
            failure.reason = verifier_pb2.FAILURE_REASON_INVALID
        case QueueFull():
            failure.reason = verifier_pb2.FAILURE_REASON_QUEUE_FULL
            failure.retry_after_ms = error.retry_after_ms
        case EngineStopped() | Draining():
            failure.reason = verifier_pb2.FAILURE_REASON_STOPPING
        case _:
            failure.reason = verifier_pb2.FAILURE_REASON_INTERNAL


def _logprob(entry: TokenLogprob) -> verifier_pb2.TokenLogprob:
    return verifier_pb2.TokenLogprob(
        logprob=entry.logprob, top_token_ids=entry.top_token_ids, top_logprobs=entry.top_logprobs
    )


def opening(sequences: Sequence[RunningSequence]) -> speculator_pb2.SpeculateRequest:
    """Sequences that will want drafts soon."""
    message = speculator_pb2.SpeculateRequest()
    for sequence in sequences:
        _open(message, sequence, prepare=True)
    return message


def _open(message: speculator_pb2.SpeculateRequest, sequence: RunningSequence, *, prepare: bool) -> None:
    message.open.add(
        sequence_id=sequence.id,
        token_ids=sequence.tokens,
        sampling=sampling_to_wire(sequence.request.sampling),
        prompt_length=len(sequence.request.prompt),
        prepare=prepare,
    )


def speculate_request(
    step: int, orders: Sequence[DraftOrder], known: Mapping[int, int]
) -> speculator_pb2.SpeculateRequest:
    """known: sequence id -> how many of its tokens the speculator has already."""
    message = speculator_pb2.SpeculateRequest(step=step)
    for order in orders:
        sequence = order.sequence
        if sequence.id not in known:
            _open(message, sequence, prepare=False)
        elif fresh := sequence.tokens[known[sequence.id] :]:
            message.advance.add(sequence_id=sequence.id, token_ids=fresh)
        message.draft.add(
            sequence_id=sequence.id,
            max_nodes=order.nodes,
            max_depth=order.depth,
            widths=order.widths,
            selection=_SELECTIONS[order.selection],
            min_confidence=order.floor,
            lookup_only=not order.models,
        )
    return message


def add_endings(message: speculator_pb2.SpeculateRequest, ended: Mapping[int, Sequence[int]]) -> None:
    """ended: by sequence id, the tokens that the speculator does not have."""
    for sequence_id, token_ids in ended.items():
        if token_ids:
            message.advance.add(sequence_id=sequence_id, token_ids=token_ids)
        message.close.append(sequence_id)


def read_drafts(
    message: speculator_pb2.SpeculateResponse, orders: Mapping[int, DraftOrder], vocab_size: int
) -> dict[int, list[TokenTree]]:
    """Trees with at least one draft token, by sequence id.

    Raises:
        InvalidTree: a tree is malformed, was not asked for, starts at another token, or exceeds its budget.
    """
    drafts: dict[int, list[TokenTree]] = {}
    for draft in message.drafts:
        if (order := orders.get(draft.sequence_id)) is None:
            raise InvalidTree(f"draft for sequence {draft.sequence_id}, which was not asked for")
        for tree_message in draft.trees:
            tree = tree_from_wire(tree_message, vocab_size)
            _check_order(tree, order)
            if len(tree) > 1:
                drafts.setdefault(draft.sequence_id, []).append(tree)
    return drafts


def _check_order(tree: TokenTree, order: DraftOrder) -> None:
    if tree.token_ids[0] != order.sequence.tokens[-1]:
        raise InvalidTree(f"root is token {tree.token_ids[0]}, the sequence ends with {order.sequence.tokens[-1]}")
    if len(tree) > order.nodes + 1 or max(tree.depths()) > order.depth:
        raise InvalidTree(
            f"{len(tree) - 1} nodes of depth {max(tree.depths())}; asked for {order.nodes} of depth {order.depth}"
        )


def status_of(error: grpc.aio.AioRpcError) -> str:
    """One line that says what a failed call met."""
    return f"{error.code().name}: {error.details()}"
