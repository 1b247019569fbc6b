"""The verifier's connection to one speculator.

A speculator may be slow, wrong, restarted or gone. A late one is not waited for again until it has answered; a wrong,
silent or lost one has its stream ended and is connected again with backoff. Nothing that happens here changes a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import grpc

from protos import tree_pb2
from protos.speculator_pb2_grpc import SpeculatorStub
from services.common.grpc_setup import aio_channel
from services.common.model_facts import TOKENIZER_METADATA, ModelFacts, ModelMismatch
from services.common.tls import Security
from services.verifier import wire
from services.verifier.draft_stream import DraftStream
from services.verifier.drafts import DraftOrder
from services.verifier.metrics import VerifierMetrics
from services.verifier.outbox import Outbox
from services.verifier.sequence import Sequence as RunningSequence
from speculation.tree import InvalidTree, TokenTree

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
# A speculator that has not answered for so long is taken for hung; until then it may be slow, or have others to answer.
HUNG_AFTER_S = 10.0


class SpeculatorLink:
    """A `DraftSource` over gRPC. The event loop connects, writes and reads; the engine's thread gives and waits.

    The first failure to connect is not an error: the engine decodes plainly until the speculator is there. A speculator
    with another tokenizer is refused, again at each reconnection.
    """

    elsewhere = True

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
        self._stream: DraftStream | None = None
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
            return stream.receive(step, deadline)
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

    def _drop(self, stream: DraftStream, reason: str, message: str) -> None:
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
        stream = DraftStream(call, max(1, len(names)), self._llm.vocab_size, self._outbox, self._count_answer)
        self._stream = stream
        self._settled.set()
        self._metrics.speculator_up.labels(self.address).set(1)
        log.info("speculator connected", extra={"at": self.address, "models": names})
        reason = await stream.run()
        if self._stream is stream:
            self._drop(stream, "unavailable", reason)
