"""The verifier's stream to one speculator.

A speculator may be slow, wrong, restarted or gone. A late one is not waited for again until it has answered; a wrong,
silent or lost one has its stream ended and is connected again with backoff. Nothing that happens here changes a token.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import grpc

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2_grpc import SpeculatorStub
from services.common.grpc_setup import aio_channel
from services.common.model_facts import TOKENIZER_METADATA, ModelFacts, ModelMismatch
from services.common.tls import Security
from services.verifier import wire
from services.verifier.drafts import DraftOrder
from services.verifier.metrics import VerifierMetrics
from services.verifier.outbox import Outbox
from services.verifier.sequence import Sequence as RunningSequence
from speculation.tree import InvalidTree, TokenTree

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
# A speculator that has not answered for so long is taken for hung; until then it may be computing a long prompt.
HUNG_AFTER_S = 10.0

_Call = grpc.aio.StreamStreamCall[speculator_pb2.SpeculateRequest, speculator_pb2.SpeculateResponse]


class SpeculatorLink:
    """A `DraftSource` over gRPC. The event loop connects, writes and reads; the engine's thread gives and waits.

    The first failure to connect is not an error: the engine decodes plainly until the speculator is there. A speculator
    with another tokenizer is refused, again at each reconnection.
    """

    def __init__(
        self, address: str, security: Security, llm: ModelFacts, metrics: VerifierMetrics, outbox: Outbox
    ) -> None:
        self.address = address
        self.names: Sequence[str] = ()  # of its models, once it was there
        self._security = security
        self._llm = llm
        self._metrics = metrics
        self._outbox = outbox
        self._loop = asyncio.get_running_loop()
        self._stream: _Stream | None = None
        self._settled = asyncio.Event()
        self._mismatch: ModelMismatch | None = None

    @asynccontextmanager
    async def connecting(self) -> AsyncIterator[None]:
        """Inside the context the link connects, and again whenever it is lost."""
        connecting = asyncio.create_task(self._connect_for_ever())
        try:
            yield
        finally:
            connecting.cancel()
            await asyncio.wait({connecting})

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the first connection; False when the speculator is not there in time.

        Raises:
            ModelMismatch: it is there, but its models do not fit the LLM.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), timeout_s)
        if self._mismatch is not None:
            raise self._mismatch
        return self._stream is not None

    @property
    def models(self) -> int:
        stream = self._stream
        return 0 if stream is None else stream.models

    def open(self, sequences: Sequence[RunningSequence]) -> None:
        if (stream := self._stream) is not None:
            stream.open(sequences)

    def send(self, step: int, orders: Sequence[DraftOrder]) -> bool:
        stream = self._stream
        if stream is None:
            return False
        if (waited := stream.behind()) > HUNG_AFTER_S:
            self._drop(stream, "hung", f"no answer for {waited:.0f} s")
        if waited > 0:
            return False
        stream.send(step, orders)
        return True

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
        stream = self._stream
        if stream is None:
            return {}
        try:
            return stream.receive(step, deadline, self._llm.vocab_size)
        except TimeoutError:
            self._metrics.speculator_failures.labels(self.address, "late").inc()
        except InvalidTree as error:
            self._drop(stream, "invalid", f"invalid draft: {error}")
        except ConnectionError as error:
            self._drop(stream, "unavailable", str(error))
        return {}

    def forget(self, sequence: RunningSequence) -> None:
        if (stream := self._stream) is not None:
            stream.forget(sequence)

    def flush(self) -> None:
        if (stream := self._stream) is not None:
            stream.flush()

    def _drop(self, stream: _Stream, reason: str, message: str) -> None:
        self._stream = None
        self._loop.call_soon_threadsafe(stream.cancel)
        self._metrics.speculator_failures.labels(self.address, reason).inc()
        log.warning("speculator dropped; decoding goes on without it", extra={"at": self.address, "reason": message})

    def _count_answer(self, seconds: float, work_seconds: float) -> None:
        self._metrics.answer_seconds.labels(self.address).observe(seconds)
        self._metrics.round_trip_seconds.labels(self.address).observe(max(0.0, seconds - work_seconds))

    async def _connect_for_ever(self) -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            try:
                # a channel for each attempt, so that it has the newest certificates
                async with aio_channel(self.address, self._security) as connection:
                    await self._connect_and_read(connection)
            except ModelMismatch as error:
                self._mismatch = error
                log.error("speculator refused", extra={"at": self.address, "reason": str(error)})
                backoff = LONGEST_BACKOFF_S
                self._settled.set()
            except grpc.aio.AioRpcError as error:
                log.warning("speculator unreachable", extra={"at": self.address, "reason": wire.status_of(error)})
            finally:
                self._metrics.speculator_up.labels(self.address).set(0)
            if time.monotonic() - started > LONGEST_BACKOFF_S:
                backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)

    async def _connect_and_read(self, connection: grpc.aio.Channel) -> None:
        """Connect, then pass responses on until the stream ends; AioRpcError when there is no connection."""
        stub = SpeculatorStub(connection)
        models = (await stub.ListModels(tree_pb2.ModelInfoRequest(), timeout=CONNECT_TIMEOUT_S)).models
        names = []
        for message in models:
            facts = ModelFacts.from_wire(message)
            facts.check_drafts_for(self._llm)
            names.append(facts.model)
        self._mismatch = None
        self.names = names
        # Look-up without a model is announced by no name; what it drafts has its share of the budget like a model's.
        call = stub.Speculate(metadata=((TOKENIZER_METADATA, self._llm.tokenizer_identity),))
        stream = _Stream(call, max(1, len(names)), self._outbox, self._count_answer)
        self._stream = stream
        self._settled.set()
        self._metrics.speculator_up.labels(self.address).set(1)
        log.info("speculator connected", extra={"at": self.address, "models": names})
        reason = await stream.run()
        if self._stream is stream:
            self._drop(stream, "unavailable", reason)


class _Stream:
    """One Speculate call and what the speculator knows at its other end.

    `run` and `cancel` are the event loop's, everything else is the engine's thread's.
    """

    def __init__(self, call: _Call, models: int, outbox: Outbox, on_answer: Callable[[float, float], None]) -> None:
        self.models = models
        self._outbox = outbox
        self._on_answer = on_answer  # seconds that an answer took, and that the speculator worked
        self._requests: asyncio.Queue[speculator_pb2.SpeculateRequest] = asyncio.Queue()
        self._responses: queue.SimpleQueue[speculator_pb2.SpeculateResponse | None] = queue.SimpleQueue()
        self._known: dict[int, int] = {}  # sequence id -> how many of its tokens the speculator has
        self._ended: dict[int, list[int]] = {}  # sequence id -> those of its tokens that the speculator does not have
        self._orders: dict[int, DraftOrder] = {}
        self._unanswered = 0  # the step whose answer is outstanding; 0 for none
        self._sent_at = 0.0
        self._call = call

    def behind(self) -> float:
        """For how long an answer to an earlier step has been outstanding, in seconds; 0 when none is."""
        while self._unanswered and not self._responses.empty():
            response = self._responses.get()
            if response is None or response.step >= self._unanswered:
                self._unanswered = 0
            if response is None:
                self._responses.put(None)  # the next receive tells that the stream has ended
        return time.monotonic() - self._sent_at if self._unanswered else 0.0

    def open(self, sequences: Sequence[RunningSequence]) -> None:
        if new := [sequence for sequence in sequences if sequence.id not in self._known]:
            self._outbox.put(self._requests, wire.opening(new))
            self._known.update({sequence.id: len(sequence.tokens) for sequence in new})

    def send(self, step: int, orders: Sequence[DraftOrder]) -> None:
        self._unanswered, self._sent_at = step, time.monotonic()
        self._orders = {order.sequence.id: order for order in orders}
        message = wire.speculate_request(step, orders, self._known)
        wire.add_endings(message, self._ended)
        self._ended = {}
        self._outbox.put(self._requests, message)
        for order in orders:
            self._known[order.sequence.id] = len(order.sequence.tokens)

    def receive(self, step: int, deadline: float, vocab_size: int) -> Mapping[int, list[TokenTree]]:
        """The trees of a step.

        Raises:
            TimeoutError: no response by the deadline. ConnectionError: the stream has ended.
            InvalidTree: a tree is malformed, is for another state, or exceeds its budget.
        """
        while True:
            try:
                response = self._responses.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if response is None:
                raise ConnectionError("the speculator ended the stream")
            if response.step > step:
                raise InvalidTree(f"response to step {response.step}, but the newest request is {step}")
            if response.step == step:
                self._unanswered = 0
                break
        for sequence_id in response.unknown_sequence_ids:
            self._known.pop(sequence_id, None)
        return wire.read_drafts(response, self._orders, vocab_size)

    def forget(self, sequence: RunningSequence) -> None:
        if (known := self._known.pop(sequence.id, None)) is not None:
            self._ended[sequence.id] = sequence.tokens[known:]

    def flush(self) -> None:
        if self._ended:
            message = speculator_pb2.SpeculateRequest()
            wire.add_endings(message, self._ended)
            self._ended = {}
            self._outbox.put(self._requests, message)

    async def run(self) -> str:
        """Pass messages on, both ways, until the call ends; why it did."""
        writing = asyncio.create_task(self._write())
        try:
            while isinstance(response := await self._call.read(), speculator_pb2.SpeculateResponse):
                self._responses.put(response)
                if response.step:
                    self._on_answer(time.monotonic() - self._sent_at, response.work_seconds)
            return "the speculator ended the stream"
        except grpc.aio.AioRpcError as error:
            return wire.status_of(error)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # the task's own end, not the call's
            return "the stream was cancelled"
        finally:
            self._responses.put(None)
            writing.cancel()
            self._call.cancel()

    async def _write(self) -> None:
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # the call has ended, which `run` is told
            while True:
                await self._call.write(await self._requests.get())

    def cancel(self) -> None:
        self._call.cancel()
