"""Protobuf to dataclasses and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grpc

from protos import verifier_pb2
from services.common.lifecycle import Draining
from services.common.tree_wire import sampling_from_wire
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

_FINISH_REASONS = {
    None: verifier_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: verifier_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: verifier_pb2.FINISH_REASON_LENGTH,
}
# Log-probabilities can be large: a response that has so many is full.
_FULL_BYTES = 2**20


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


def status_of(error: grpc.aio.AioRpcError) -> str:
    """One line that says what a failed call met."""
    return f"{error.code().name}: {error.details()}"
