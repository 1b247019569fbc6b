"""The speculator's gRPC face: one worker thread owns the models, streams take turns on it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import grpc

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2_grpc import SpeculatorServicer, add_SpeculatorServicer_to_server
from runtime.transformer import LoadOptions
from services.common.grpc_setup import StatusError, aio_server, start_grpc, stop_grpc
from services.common.lifecycle import Lifecycle, StartupError
from services.common.loaded_model import LoadedModel, use_threads
from services.common.model_facts import ModelFacts, ModelMismatch
from services.common.tree_wire import sampling_from_wire, tree_to_wire
from services.speculator import wire
from services.speculator.drafter import Drafter, DrafterSettings
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.settings import SpeculatorSettings
from speculation.calibration import Calibration, InvalidCalibration

log = logging.getLogger(__name__)

SERVICE = "specserve.v1.Speculator"


class DraftService:
    """Answers one message after the other with all models. Only the worker thread calls it."""

    def __init__(self, drafters: list[Drafter], vocab_size: int, metrics: SpeculatorMetrics) -> None:
        self._drafters = drafters
        self._vocab_size = vocab_size
        self._metrics = metrics

    def answer(self, stream: int, message: speculator_pb2.SpeculateRequest) -> speculator_pb2.SpeculateResponse:
        """Apply a message in the order of its fields; InvalidMessage or ValueError when it breaks the protocol."""
        for sequence_id in message.close:
            for drafter in self._drafters:
                drafter.close((stream, sequence_id))
        for opened in message.open:
            self._open(stream, opened)
        unknown = {advance.sequence_id for advance in message.advance if not self._advance(stream, advance)}
        orders = [wire.draft_order(stream, order) for order in message.draft]
        unknown |= {order.key[1] for order in orders if order.key not in self._drafters[0]}
        known = [order for order in orders if order.key[1] not in unknown]
        response = speculator_pb2.SpeculateResponse(step=message.step, unknown_sequence_ids=sorted(unknown))
        grown = [drafter.draft(known) for drafter in self._drafters]
        for order in known:
            trees = [trees[order.key] for trees in grown if order.key in trees]
            response.drafts.add(sequence_id=order.key[1], trees=[tree_to_wire(tree) for tree in trees])
            self._metrics.draft_tokens.inc(sum(len(tree) - 1 for tree in trees))
        return response

    def end(self, stream: int) -> None:
        """Forget everything that a stream has opened."""
        for drafter in self._drafters:
            drafter.close_stream(stream)

    def _open(self, stream: int, message: speculator_pb2.OpenSequence) -> None:
        tokens = list(message.token_ids)
        wire.check_tokens("open.token_ids", tokens, self._vocab_size)
        params = sampling_from_wire(message.sampling)
        for drafter in self._drafters:
            drafter.open((stream, message.sequence_id), tokens, message.prompt_length, params)

    def _advance(self, stream: int, message: speculator_pb2.AdvanceSequence) -> bool:
        key = (stream, message.sequence_id)
        if key not in self._drafters[0]:
            return False
        tokens = list(message.token_ids)
        wire.check_tokens("advance.token_ids", tokens, self._vocab_size)
        for drafter in self._drafters:
            drafter.advance(key, tokens)
        return True


class Servicer(SpeculatorServicer):
    """One Speculate stream for each verifier; sessions end with their stream."""

    def __init__(
        self,
        service: DraftService,
        facts: list[ModelFacts],
        worker: ThreadPoolExecutor,
        lifecycle: Lifecycle,
        metrics: SpeculatorMetrics,
    ) -> None:
        self._service = service
        self._facts = facts
        self._worker = worker
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._streams = itertools.count(1)

    async def ListModels(
        self, request: tree_pb2.ModelInfoRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> speculator_pb2.DraftModels:
        return speculator_pb2.DraftModels(models=[facts.to_wire() for facts in self._facts])

    async def Speculate(
        self,
        request_iterator: AsyncIterator[speculator_pb2.SpeculateRequest],
        context: grpc.aio.ServicerContext[object, object],
    ) -> AsyncIterator[speculator_pb2.SpeculateResponse]:
        stream = next(self._streams)
        loop = asyncio.get_running_loop()
        ending = asyncio.ensure_future(self._lifecycle.drain_started.wait())
        self._metrics.streams.inc()
        try:
            while (message := await _next_unless(request_iterator, ending)) is not None:
                with self._metrics.answer_seconds.time():
                    yield await loop.run_in_executor(self._worker, self._service.answer, stream, message)
        except ValueError as error:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        finally:
            ending.cancel()
            self._metrics.streams.dec()
            self._worker.submit(self._service.end, stream)


async def _next_unless(
    messages: AsyncIterator[speculator_pb2.SpeculateRequest], ending: asyncio.Future[Any]
) -> speculator_pb2.SpeculateRequest | None:
    """The next message; None when the stream or the service ends first."""
    following = asyncio.ensure_future(anext(messages, None))
    both: set[asyncio.Future[Any]] = {following, ending}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if following.done():
        return following.result()
    following.cancel()
    return None


@asynccontextmanager
async def serve(settings: SpeculatorSettings, lifecycle: Lifecycle) -> AsyncIterator[None]:
    """Load the models, serve until the context ends."""
    worker = ThreadPoolExecutor(1, "drafts", initializer=use_threads, initargs=(settings.threads,))
    loaded = await asyncio.get_running_loop().run_in_executor(worker, _load, settings)
    metrics = SpeculatorMetrics(lifecycle.registry)
    drafters = [_drafter(settings, model) for model in loaded]
    service = DraftService(drafters, loaded[0].facts.vocab_size, metrics)
    server = aio_server(lifecycle, exempt=frozenset({f"/{SERVICE}/Speculate"}))
    servicer = Servicer(service, [model.facts for model in loaded], worker, lifecycle, metrics)
    add_SpeculatorServicer_to_server(servicer, server)
    try:
        await start_grpc(server, lifecycle, settings.host, settings.port, (SERVICE,))
        yield
    finally:
        await stop_grpc(server)
        worker.shutdown()


def _load(settings: SpeculatorSettings) -> list[LoadedModel]:
    """Load every model; StartupError when one cannot be served or differs from the first in its tokens."""
    options = LoadOptions(settings.device, settings.dtype, settings.kernels)
    share = settings.kv_memory / len(settings.ssm)
    loaded = [LoadedModel.load(ssm, options, share, settings.max_sequences) for ssm in settings.ssm]
    for model in loaded:
        try:
            model.facts.check_drafts_for(loaded[0].facts)
        except ModelMismatch as error:
            raise StartupError(str(error)) from None
    return loaded


def _drafter(settings: SpeculatorSettings, loaded: LoadedModel) -> Drafter:
    """StartupError when the model's calibration is broken."""
    try:
        calibration = Calibration.read(loaded.folder)
    except InvalidCalibration as error:
        raise StartupError(str(error)) from None
    log.info("draft calibrated", extra={"model": loaded.facts.model, **asdict(calibration)})
    drafting = DrafterSettings(
        prefill_chunk=settings.prefill_chunk,
        beam=settings.beam,
        min_confidence=settings.min_confidence,
        stream=secrets.randbits(63),
        calibration=calibration,
    )
    return Drafter(loaded.facts.model, loaded.model, loaded.cache, drafting)
