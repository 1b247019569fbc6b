"""The verifier's service as the gateway calls it. The only module of the gateway that touches protobuf and gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import NoReturn

import grpc
import grpc.aio

from protos import tree_pb2, verifier_pb2, verifier_pb2_grpc
from services.common.grpc_setup import aio_channel, is_serving, wait_not_serving
from services.common.tls import Security
from services.gateway.addresses import Address
from services.gateway.generation import (
    FinishReason,
    GenerationRequest,
    Logprob,
    ModelFacts,
    Sampling,
    Step,
    VerifierBusy,
    VerifierFailed,
    VerifierRefused,
    VerifierTimeout,
    VerifierUnavailable,
)

RETRY_AFTER_KEY = "retry-after-ms"
# Initial metadata with which a verifier says "admitted" before the first token is there.
ADMITTED_KEY = "specserve-admitted"
DEFAULT_RETRY_AFTER_MS = 1000

_Call = grpc.aio.UnaryStreamCall[verifier_pb2.GenerateRequest, verifier_pb2.GenerateResponse]


class VerifierClient:
    """Calls to one verifier.

    Every method fails with a VerifierError; none retries. A verifier that comes back is found within a second.
    """

    def __init__(self, address: Address, security: Security) -> None:
        self._channel = aio_channel(str(address), security, address.name)
        self._stub = verifier_pb2_grpc.VerifierStub(self._channel)

    async def close(self) -> None:
        """Cancel what is open."""
        await self._channel.close()

    async def serving(self, timeout_s: float) -> bool:
        """Whether the verifier's health check says SERVING within the time."""
        return await is_serving(self._channel, timeout_s=timeout_s)

    async def wait_not_serving(self) -> None:
        """Return when it says that it takes no more requests; VerifierUnavailable when the connection is lost."""
        try:
            await wait_not_serving(self._channel)
        except grpc.aio.AioRpcError as error:
            _raise_mapped(error)

    async def model_facts(self, timeout_s: float) -> ModelFacts:
        """Facts of the model that the verifier serves."""
        try:
            info: tree_pb2.ModelInfo = await self._stub.GetModelInfo(tree_pb2.ModelInfoRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise VerifierUnavailable(f"the verifier gave no model facts within {timeout_s:g} s") from error
            _raise_mapped(error)
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

    def generate(
        self,
        request: GenerationRequest,
        generated_token_ids: Sequence[int],
        timeout_s: float,
        on_end: Callable[[], None],
    ) -> GenerateStream:
        """Begin to generate behind `generated_token_ids`, which an earlier attempt produced.

        on_end: called once when the call is over, however it ended.
        """
        message = verifier_pb2.GenerateRequest(
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
        call = self._stub.Generate(message, timeout=timeout_s)
        call.add_done_callback(lambda _: on_end())
        return GenerateStream(call)


class GenerateStream:
    """One `Generate` call."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._first: verifier_pb2.GenerateResponse | None = None

    async def admitted(self) -> None:
        """Return once the verifier has taken the sequence; raise what it answered if it has not."""
        try:
            metadata = await self._call.initial_metadata()
            if ADMITTED_KEY not in dict(metadata or ()):
                self._first = await self._read()
        except grpc.aio.AioRpcError as error:
            _raise_mapped(error)

    async def steps(self) -> AsyncIterator[Step]:
        """The steps, up to and with the one that has a finish reason."""
        while True:
            try:
                response = self._first or await self._read()
            except grpc.aio.AioRpcError as error:
                _raise_mapped(error)
            self._first = None
            step = _step(response)
            yield step
            if step.finish_reason is not None:
                await self._call.code()  # the call is over when its status is here
                return

    def cancel(self) -> None:
        """Free what the sequence holds; nothing happens when the call has ended."""
        self._call.cancel()

    async def _read(self) -> verifier_pb2.GenerateResponse:
        response = await self._call.read()
        if isinstance(response, verifier_pb2.GenerateResponse):
            return response
        raise VerifierFailed("the verifier ended the generation without a finish reason")


def _raise_mapped(error: grpc.aio.AioRpcError) -> NoReturn:
    code, details = error.code(), error.details() or "no details"
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise VerifierBusy(f"the queue is full: {details}", _retry_after_ms(error)) from error
        case grpc.StatusCode.INVALID_ARGUMENT:
            raise VerifierRefused(details) from error
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            raise VerifierTimeout("the request's time is over") from error
        case grpc.StatusCode.UNAVAILABLE:
            raise VerifierUnavailable(f"the verifier is unavailable: {details}") from error
        case _:
            raise VerifierFailed(f"the verifier failed with {code.name}: {details}") from error


def _retry_after_ms(error: grpc.aio.AioRpcError) -> int:
    value = dict(error.trailing_metadata() or ()).get(RETRY_AFTER_KEY, "")
    return int(value) if isinstance(value, str) and value.isdecimal() else DEFAULT_RETRY_AFTER_MS


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


def _step(response: verifier_pb2.GenerateResponse) -> Step:
    if response.logprobs and len(response.logprobs) != len(response.token_ids):
        raise VerifierFailed(
            f"the verifier sent {len(response.logprobs)} log-probabilities for {len(response.token_ids)} tokens"
        )
    return Step(
        token_ids=tuple(response.token_ids),
        logprobs=tuple(_logprob(entry) for entry in response.logprobs),
        prompt_logprobs=tuple(_logprob(entry) for entry in response.prompt_logprobs),
        finish_reason=_FINISH_REASONS[response.finish_reason],
        llm_steps=response.llm_steps,
    )


def _logprob(entry: verifier_pb2.TokenLogprob) -> Logprob:
    return Logprob(entry.logprob, tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)))
