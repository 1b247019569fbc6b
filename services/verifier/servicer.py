"""The verifier's gRPC calls. What a step gives all sequences of a gateway goes back in one message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import grpc

from protos import tree_pb2, verifier_pb2
from protos.verifier_pb2_grpc import VerifierServicer
from services.common.grpc_setup import StatusError, status_of
from services.common.lifecycle import Draining, Lifecycle
from services.common.model_facts import ModelFacts
from services.verifier import wire
from services.verifier.outbox import Outbox
from services.verifier.request import EngineStopped, GenerationRequest, InvalidRequest, QueueFull, SequenceEvent, Sink

log = logging.getLogger(__name__)

SERVICE = "specserve.v1.Verifier"
# Calls that last as long as their gateway: not they are open work, their sequences are.
UNCOUNTED = frozenset({f"/{SERVICE}/Generate"})


class SequenceEngine(Protocol):
    """What generates; see services.verifier.engine.Engine."""

    def submit(self, request: GenerationRequest, sink: Sink) -> int:
        """Queue a request and return its id; InvalidRequest, QueueFull or EngineStopped when it is refused."""

    def cancel(self, sequence_id: int) -> None:
        """Free what it holds; one that has ended is ignored."""


class Servicer(VerifierServicer):
    """One Generate stream for each gateway; its sequences end with it."""

    def __init__(self, engine: SequenceEngine, facts: ModelFacts, outbox: Outbox, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._facts = facts
        self._outbox = outbox
        self._lifecycle = lifecycle

    async def GetModelInfo(
        self, request: tree_pb2.ModelInfoRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> tree_pb2.ModelInfo:
        return self._facts.to_wire()

    async def Generate(
        self, request_iterator: AsyncIterator[verifier_pb2.GenerateRequest], context: object
    ) -> AsyncGenerator[verifier_pb2.GenerateResponse, None]:
        stream = GenerateStream(self._engine, self._outbox, self._lifecycle)
        taking = asyncio.ensure_future(stream.take(request_iterator))
        draining = asyncio.ensure_future(self._lifecycle.drain_started.wait())
        draining.add_done_callback(lambda _: stream.look())
        try:
            async for response in stream.responses():
                yield response
        finally:
            taking.cancel()
            draining.cancel()
            stream.close()


@dataclass(frozen=True)
class _Open:
    """A sequence that has not ended. work: of the lifecycle, whose drain waits for it."""

    engine_id: int
    work: ExitStack


class GenerateStream:
    """One Generate call: `take` its messages beside sending its `responses`; `close` at the end."""

    def __init__(self, engine: SequenceEngine, outbox: Outbox, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._outbox = outbox
        self._lifecycle = lifecycle
        self._open: dict[int, _Open] = {}
        self._last_id = 0
        self._events: asyncio.Queue[tuple[int, SequenceEvent] | None] = asyncio.Queue()  # None: see `look`
        self._half_closed = False
        self._fault: StatusError | None = None

    async def take(self, messages: AsyncIterator[verifier_pb2.GenerateRequest]) -> None:
        """Begin and cancel sequences, until the caller half-closes the stream or breaks its rules."""
        try:
            async for message in messages:
                for sequence in message.begin:
                    self._begin(sequence)
                for sequence_id in message.cancel:
                    self._cancel(sequence_id)
        except StatusError as fault:
            self._fault = fault
        finally:
            self._half_closed = True
            self.look()

    async def responses(self) -> AsyncIterator[verifier_pb2.GenerateResponse]:
        """What becomes of the sequences, as it comes, until the last has ended and none can begin any more.

        Raises:
            StatusError: INVALID_ARGUMENT, the caller has broken the rules of the stream.
        """
        while self._open or not (self._half_closed or self._lifecycle.draining):
            come = [await self._events.get()]
            while not self._events.empty():
                come.append(self._events.get_nowait())
            if self._fault is not None:
                raise self._fault
            events = [event for event in come if event is not None]
            for response in wire.generate_responses(events):
                yield response
            for sequence_id, event in events:
                if wire.is_last(event):
                    self._forget(sequence_id)

    def look(self) -> None:
        """Let `responses` see whether the stream is over: a drain may have begun, or the last sequence be cancelled."""
        self._events.put_nowait(None)

    def close(self) -> None:
        """Free what the sequences that have not ended hold."""
        for sequence_id in list(self._open):
            self._cancel(sequence_id)

    def _begin(self, message: verifier_pb2.BeginSequence) -> None:
        sequence_id = message.sequence_id
        if sequence_id <= self._last_id:
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"sequence id {sequence_id} behind {self._last_id}; each must be larger than those before it",
            )
        self._last_id = sequence_id
        event: SequenceEvent = None
        with ExitStack() as work:
            try:
                work.enter_context(self._lifecycle.work())
                engine_id = self._engine.submit(wire.generation_request(message), partial(self._hand_over, sequence_id))
                self._open[sequence_id] = _Open(engine_id, work.pop_all())
            except (InvalidRequest, QueueFull, EngineStopped, Draining) as refusal:
                event = refusal
            except Exception as error:  # one that nobody planned for fails alone
                log.exception("a request failed")
                event = status_of(error)
        self._events.put_nowait((sequence_id, event))

    def _hand_over(self, sequence_id: int, event: SequenceEvent) -> None:
        """The sink of a sequence, called in the engine's thread."""
        self._outbox.put(self._events, (sequence_id, event))

    def _cancel(self, sequence_id: int) -> None:
        if (sequence := self._open.get(sequence_id)) is not None:
            self._engine.cancel(sequence.engine_id)
            self._forget(sequence_id)
            self.look()

    def _forget(self, sequence_id: int) -> None:
        if (sequence := self._open.pop(sequence_id, None)) is not None:
            sequence.work.close()
