"""One Speculate call: what goes to a speculator, what comes back, and what it knows."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import grpc

from protos import speculator_pb2
from services.verifier import wire
from services.verifier.drafts import DraftOrder
from services.verifier.outbox import Outbox
from services.verifier.sequence import Sequence as RunningSequence
from speculation.tree import InvalidTree, TokenTree

_Call = grpc.aio.StreamStreamCall[speculator_pb2.SpeculateRequest, speculator_pb2.SpeculateResponse]


class DraftStream:
    """The engine's thread gives orders and takes their answers; the event loop writes and reads.

    on_answer: gets the seconds that each answer took, and those of them that the speculator worked.
    `run` and `cancel` are the event loop's, everything else is the engine's thread's.
    """

    def __init__(self, call: _Call, models: int, outbox: Outbox, on_answer: Callable[[float, float], None]) -> None:
        self.models = models
        self._outbox = outbox
        self._on_answer = on_answer
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
