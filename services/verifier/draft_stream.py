"""One Speculate call: what goes to a speculator and what comes back, between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import grpc

from protos import speculator_pb2
from services.common.draft_wire import request_to_wire, response_from_wire
from services.common.drafting import SpeculateRequest
from services.verifier import wire
from services.verifier.draft_dialogue import DraftDialogue
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

    def __init__(
        self,
        call: _Call,
        models: int,
        vocab_size: int,
        outbox: Outbox,
        on_answer: Callable[[float, float], None],
    ) -> None:
        self.models = models
        self._dialogue = DraftDialogue(vocab_size)
        self._vocab_size = vocab_size
        self._outbox = outbox
        self._on_answer = on_answer
        self._requests: asyncio.Queue[speculator_pb2.SpeculateRequest] = asyncio.Queue()
        self._responses: queue.SimpleQueue[speculator_pb2.SpeculateResponse | None] = queue.SimpleQueue()
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
        self._put(self._dialogue.opening(sequences))

    def send(self, step: int, orders: Sequence[DraftOrder]) -> None:
        request = self._dialogue.order(step, orders)
        self._unanswered, self._sent_at = step, time.monotonic()
        self._put(request)

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
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
        return self._dialogue.drafts(response_from_wire(response, self._vocab_size))

    def forget(self, sequence: RunningSequence) -> None:
        self._dialogue.forget(sequence)

    def flush(self) -> None:
        self._put(self._dialogue.endings())

    def _put(self, request: SpeculateRequest | None) -> None:
        if request is not None:
            self._outbox.put(self._requests, request_to_wire(request))

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
