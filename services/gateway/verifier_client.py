"""The verifier's service as the gateway calls it: one stream for all sequences that it has there."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import grpc
import grpc.aio

from protos import tree_pb2, verifier_pb2, verifier_pb2_grpc
from services.common.grpc_setup import aio_channel, is_serving, wait_not_serving
from services.common.tls import Security
from services.gateway import wire
from services.gateway.addresses import Address
from services.gateway.generation import (
    GenerationRequest,
    ModelFacts,
    Step,
    VerifierError,
    VerifierFailed,
    VerifierUnavailable,
)

_Call = grpc.aio.StreamStreamCall[verifier_pb2.GenerateRequest, verifier_pb2.GenerateResponse]


class VerifierClient:
    """Calls to one verifier.

    Every method fails with a VerifierError; none retries. A verifier that comes back is found within a second.
    """

    def __init__(self, address: Address, security: Security) -> None:
        self._channel = aio_channel(str(address), security, address.name)
        self._stub = verifier_pb2_grpc.VerifierStub(self._channel)
        self._stream: GenerateStream | None = None

    async def close(self) -> None:
        """Cancel what is open."""
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()

    async def serving(self, timeout_s: float) -> bool:
        """Whether the verifier's health check says SERVING within the time."""
        with _verifier_errors():
            return await is_serving(self._channel, timeout_s=timeout_s)

    async def wait_not_serving(self) -> None:
        """Return when it says that it takes no more requests; VerifierUnavailable when the connection is lost."""
        with _verifier_errors():
            await wait_not_serving(self._channel)

    async def model_facts(self, timeout_s: float) -> ModelFacts:
        """Facts of the model that the verifier serves."""
        with _verifier_errors():
            info: tree_pb2.ModelInfo = await self._stub.GetModelInfo(tree_pb2.ModelInfoRequest(), timeout=timeout_s)
        return wire.model_facts(info)

    def generate(
        self, request: GenerationRequest, generated_token_ids: Sequence[int], on_end: Callable[[], None]
    ) -> RemoteSequence:
        """Begin to generate behind `generated_token_ids`, which an earlier attempt produced.

        on_end: called once when nothing more comes, whatever the reason.
        """
        if self._stream is None or self._stream.over:
            with _verifier_errors():
                self._stream = GenerateStream(self._stub.Generate())
        return self._stream.begin(request, generated_token_ids, on_end)


@contextmanager
def _verifier_errors() -> Iterator[None]:
    """What ends a call, as a VerifierError: also that its channel was closed, before it or in the middle of it.

    To the caller the latter looks as if its own task had been cancelled, and a task group would say nothing of it.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise wire.error_of_call(error) from error
    except grpc.aio.UsageError as error:
        raise VerifierUnavailable(f"the verifier is unavailable: {error}") from error
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise VerifierUnavailable("the verifier is unavailable: the gateway has closed its connection") from None


class RemoteSequence:
    """One sequence of a stream: first `admitted`, then `steps`; `cancel` when no more of them are wanted."""

    def __init__(self, cancel: Callable[[], None], on_end: Callable[[], None]) -> None:
        self.cancel = cancel
        self.on_end = on_end
        self._events: asyncio.Queue[Step | VerifierError | None] = asyncio.Queue()

    async def admitted(self) -> None:
        """Return once the verifier has taken the sequence; raise what it answered if it has not."""
        event = await self._events.get()
        if isinstance(event, VerifierError):
            raise event
        if event is not None:
            raise VerifierFailed("the verifier sent tokens of a sequence before it admitted it")

    async def steps(self) -> AsyncIterator[Step]:
        """The steps, up to and with the one that has a finish reason."""
        while True:
            event = await self._events.get()
            if isinstance(event, VerifierError):
                raise event
            if event is not None:
                yield event
                if event.finish_reason is not None:
                    return

    def put(self, event: Step | VerifierError | None) -> None:
        """What became of it, in order; None: it is admitted."""
        self._events.put_nowait(event)


class GenerateStream:
    """One Generate call and the sequences on it; when it ends they all fail, and it is `over`."""

    def __init__(self, call: _Call) -> None:
        self.over = False
        self._call = call
        self._ids = itertools.count(1)
        self._open: dict[int, RemoteSequence] = {}
        self._outgoing: asyncio.Queue[verifier_pb2.GenerateRequest] = asyncio.Queue()
        self._tasks = (asyncio.create_task(self._send()), asyncio.create_task(self._receive()))

    def begin(
        self, request: GenerationRequest, generated_token_ids: Sequence[int], on_end: Callable[[], None]
    ) -> RemoteSequence:
        """See VerifierClient.generate."""
        sequence_id = next(self._ids)
        sequence = self._open[sequence_id] = RemoteSequence(partial(self._cancel, sequence_id), on_end)
        begin = wire.begin_sequence(sequence_id, request, generated_token_ids)
        self._outgoing.put_nowait(verifier_pb2.GenerateRequest(begin=[begin]))
        return sequence

    async def close(self) -> None:
        """Cancel the call, and with it what is open."""
        self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _cancel(self, sequence_id: int) -> None:
        if sequence_id in self._open:
            self._outgoing.put_nowait(verifier_pb2.GenerateRequest(cancel=[sequence_id]))
            self._open.pop(sequence_id).on_end()

    async def _send(self) -> None:
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # the call has ended, which `_receive` is told
            while True:
                await self._call.write(await self._outgoing.get())

    async def _receive(self) -> None:
        reason: VerifierError = VerifierUnavailable("the verifier has ended the stream of its outputs")
        try:
            while isinstance(response := await self._call.read(), verifier_pb2.GenerateResponse):
                self._take(response)
        except grpc.aio.AioRpcError as error:
            reason = wire.error_of_call(error)
        finally:
            self.over = True
            self._call.cancel()  # of a response that is no response the verifier knows nothing
            self._tasks[0].cancel()
            for sequence_id in list(self._open):
                self._end(sequence_id, reason)

    def _take(self, response: verifier_pb2.GenerateResponse) -> None:
        """Hand out what it says of sequences that are open: of cancelled ones something may still come."""
        for sequence_id in response.admitted:
            if sequence_id in self._open:
                self._open[sequence_id].put(None)
        for output in response.outputs:
            if output.sequence_id in self._open:
                self._take_output(output)
        for failure in response.failures:
            if failure.sequence_id in self._open:
                self._end(failure.sequence_id, wire.error_of_sequence(failure))

    def _take_output(self, output: verifier_pb2.SequenceOutput) -> None:
        try:
            step = wire.step(output)
        except VerifierFailed as error:
            self._open[output.sequence_id].put(error)
            self._cancel(output.sequence_id)
            return
        if step.finish_reason is None:
            self._open[output.sequence_id].put(step)
        else:
            self._end(output.sequence_id, step)

    def _end(self, sequence_id: int, last: Step | VerifierError) -> None:
        sequence = self._open.pop(sequence_id)
        sequence.put(last)
        sequence.on_end()
