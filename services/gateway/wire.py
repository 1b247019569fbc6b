"""Protobuf to the gateway's own terms and back."""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from protos import tree_pb2, verifier_pb2
from services.gateway.generation import (
    FinishReason,
    GenerationRequest,
    Logprob,
    ModelFacts,
    Sampling,
    Step,
    VerifierBusy,
    VerifierError,
    VerifierFailed,
    VerifierRefused,
    VerifierUnavailable,
)

DEFAULT_RETRY_AFTER_MS = 1000


def begin_sequence(
    sequence_id: int, request: GenerationRequest, generated_token_ids: Sequence[int]
) -> verifier_pb2.BeginSequence:
    """generated_token_ids: what an earlier attempt produced."""
    return verifier_pb2.BeginSequence(
        sequence_id=sequence_id,
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        generated_token_ids=generated_token_ids,
        sampling=_sampling_message(request.sampling),
        max_new_tokens=request.max_new_tokens,
        stop_token_ids=request.stop_token_ids,
        top_logprobs=request.top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        speculative=request.speculative,
    )


def model_facts(info: tree_pb2.ModelInfo) -> ModelFacts:
    return ModelFacts(
        model=info.model,
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        tokenizer_hash=info.tokenizer_hash,
        eos_token_ids=tuple(info.eos_token_ids),
        device=info.device,
        dtype=info.dtype,
        kernels=info.kernels,
    )


def error_of_call(error: grpc.aio.AioRpcError) -> VerifierError:
    """What the end of a call means for all that it was for."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE:
        return VerifierUnavailable(f"the verifier is unavailable: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return VerifierUnavailable("the verifier is unavailable: it did not answer in time")
    return VerifierFailed(f"the verifier failed with {code.name}: {details}")


def error_of_sequence(failure: verifier_pb2.SequenceFailure) -> VerifierError:
    message = failure.message or "no details"
    match failure.reason:
        case verifier_pb2.FAILURE_REASON_QUEUE_FULL:
            return VerifierBusy(f"the queue is full: {message}", failure.retry_after_ms or DEFAULT_RETRY_AFTER_MS)
        case verifier_pb2.FAILURE_REASON_INVALID:
            return VerifierRefused(message)
        case verifier_pb2.FAILURE_REASON_STOPPING:
            return VerifierUnavailable(f"the verifier is unavailable: {message}")
        case _:
            return VerifierFailed(f"the verifier failed: {message}")


def _sampling_message(sampling: Sampling) -> tree_pb2.SamplingParams:
    return tree_pb2.SamplingParams(
        logit_bias=sampling.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
    )


_FINISH_REASONS = {
    verifier_pb2.FINISH_REASON_UNSPECIFIED: None,
    verifier_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    verifier_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def step(output: verifier_pb2.SequenceOutput) -> Step:
    """Raises VerifierFailed when it is not what was asked for."""
    if output.logprobs and len(output.logprobs) != len(output.token_ids):
        raise VerifierFailed(
            f"the verifier sent {len(output.logprobs)} log-probabilities for {len(output.token_ids)} tokens"
        )
    if output.finish_reason not in _FINISH_REASONS:
        raise VerifierFailed(f"the verifier sent finish reason {output.finish_reason}, which is not known here")
    return Step(
        token_ids=tuple(output.token_ids),
        logprobs=tuple(_logprob(entry) for entry in output.logprobs),
        prompt_logprobs=tuple(_logprob(entry) for entry in output.prompt_logprobs),
        finish_reason=_FINISH_REASONS[output.finish_reason],
        llm_steps=output.llm_steps,
    )


def _logprob(entry: verifier_pb2.TokenLogprob) -> Logprob:
    if len(entry.top_token_ids) != len(entry.top_logprobs):
        raise VerifierFailed(
            f"the verifier sent {len(entry.top_logprobs)} log-probabilities of {len(entry.top_token_ids)} alternatives"
        )
    return Logprob(entry.logprob, tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)))
