"""The speculator's gRPC face. The event loop's own thread drafts: streams take turns, and a change of threads for each
message would cost as much as a small model's draft. Long texts are computed in pieces, between messages; health calls
wait for the draft or the piece under way.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2_grpc import SpeculatorServicer, add_SpeculatorServicer_to_server
from services.common.draft_wire import request_from_wire, response_to_wire
from services.common.drafting import DraftRequest
from services.common.grpc_setup import MAX_MESSAGE_BYTES, Endpoint, StatusError, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle
from services.common.loaded_model import use_threads
from services.common.model_facts import TOKENIZER_METADATA
from services.common.tls import security_of
from services.speculator.loading import LoadedSpeculator
from services.speculator.settings import SpeculatorSettings
from speculation.children import ChildSelection

log = logging.getLogger(__name__)

SERVICE = "specserve.v1.Speculator"
# Of an answer; the rest of it has room for tokens and confidences of a hundred thousand nodes.
DISTRIBUTION_BYTES = MAX_MESSAGE_BYTES - 2 * 2**20
# Before each piece of text: long enough for a message that has come to be read.
_PAUSE_S = 0.001

Context = grpc.aio.ServicerContext[speculator_pb2.SpeculateRequest, speculator_pb2.SpeculateResponse]


class Servicer(SpeculatorServicer):
    """One Speculate stream for each verifier; sessions end with their stream."""

    def __init__(self, loaded: LoadedSpeculator, lifecycle: Lifecycle) -> None:
        self._service = loaded.service
        self._facts = loaded.facts
        self._metrics = loaded.metrics
        self._lifecycle = lifecycle
        self._streams = itertools.count(1)
        self._shortened: set[int] = set()  # streams with an order that did not fit
        self._working: asyncio.Task[None] | None = None  # between the messages
        row_bytes = sum(4 * facts.vocab_size for facts in self._facts)
        self._rows = DISTRIBUTION_BYTES // max(1, row_bytes)
        self._tokenizer = self._facts[0].tokenizer_identity if self._facts else None

    async def ListModels(
        self, request: tree_pb2.ModelInfoRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> speculator_pb2.DraftModels:
        return speculator_pb2.DraftModels(models=[facts.to_wire() for facts in self._facts])

    async def Speculate(  # type: ignore[override]  # grpc.aio takes a coroutine that writes too; its stub does not say so
        self, request_iterator: object, context: Context
    ) -> None:
        self._check_tokenizer(context)
        stream = next(self._streams)
        call = asyncio.current_task()
        assert call is not None
        ending = asyncio.ensure_future(self._lifecycle.drain_started.wait())
        ending.add_done_callback(lambda drain: drain.cancelled() or call.cancel())
        self._metrics.streams.inc()
        try:
            while isinstance(message := await context.read(), speculator_pb2.SpeculateRequest):
                await context.write(self._answer(stream, message))
                self._go_on()
        except ValueError as error:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except asyncio.CancelledError:
            if not self._lifecycle.draining:
                raise
        finally:
            ending.cancel()
            self._metrics.streams.dec()
            self._shortened.discard(stream)
            self._service.end(stream)

    def _answer(self, stream: int, message: speculator_pb2.SpeculateRequest) -> speculator_pb2.SpeculateResponse:
        """What it takes to read the message and to write the answer is work, too."""
        started = time.perf_counter()
        request = request_from_wire(message)
        fitting = _fitting(request.draft, self._rows)
        if fitting != request.draft and stream not in self._shortened:
            self._shortened.add(stream)
            log.warning(
                "sampled trees made smaller or left out; their distributions exceed a message",
                extra={"distributions": self._rows, "ordered": sum(wish.max_nodes for wish in request.draft)},
            )
        request.draft = fitting
        answer = response_to_wire(self._service.answer(stream, request))
        answer.work_seconds = time.perf_counter() - started
        return answer

    def _go_on(self) -> None:
        """What failed between two messages fails the stream that finds it: its verifier opens its sequences anew."""
        if self._working is not None:
            if not self._working.done():
                return
            working, self._working = self._working, None
            working.result()
        self._working = asyncio.create_task(self._work_ahead())

    async def _work_ahead(self) -> None:
        more = True
        while more:
            await asyncio.sleep(_PAUSE_S)
            more = self._service.work_ahead()

    def _check_tokenizer(self, context: Context) -> None:
        """Refuse a verifier of another tokenizer; where no model has one, the first verifier's counts."""
        theirs = dict(context.invocation_metadata() or ()).get(TOKENIZER_METADATA)
        if theirs is not None and self._tokenizer is None:
            self._tokenizer = str(theirs)
        if theirs is not None and theirs != self._tokenizer:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this speculator drafts for tokenizer {self._tokenizer}, the verifier has {theirs!s}; start a "
                "speculator for each tokenizer, and again when the verifier's changes",
            )


def _fitting(wishes: Sequence[DraftRequest], rows: int) -> list[DraftRequest]:
    """The wishes, in their order, until each model has given `rows` distributions; behind them look-up alone.

    A sampled tree counts with all the distributions that it may have, one for each node: what fits may not depend on
    what is drawn.
    """
    fitting: list[DraftRequest] = []
    for wish in wishes:
        if wish.selection is ChildSelection.SAMPLED and not wish.lookup_only:
            nodes = min(wish.max_nodes, rows)
            rows -= nodes
            wish = wish._replace(max_nodes=nodes) if nodes else wish._replace(lookup_only=True)
        fitting.append(wish)
    return fitting


@asynccontextmanager
async def serve(settings: SpeculatorSettings, lifecycle: Lifecycle) -> AsyncIterator[None]:
    """Load the models, serve until the context ends."""
    security = security_of(settings)
    endpoint = Endpoint(settings.host, settings.port, settings.health_port)
    use_threads(settings.threads)
    loaded = LoadedSpeculator.load(settings, lifecycle.registry)
    server = aio_server(lifecycle, exempt=frozenset({f"/{SERVICE}/Speculate"}))
    servicer = Servicer(loaded, lifecycle)
    add_SpeculatorServicer_to_server(servicer, server)
    async with serving_grpc(server, lifecycle, endpoint, security, (SERVICE,)):
        yield
