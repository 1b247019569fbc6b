"""The speculator's gRPC face. The event loop's own thread drafts: streams take turns, and a change of threads for each
message would cost as much as a small model's draft. Health calls wait for the draft under way.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial

import grpc

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2_grpc import SpeculatorServicer, add_SpeculatorServicer_to_server
from runtime.transformer import LoadOptions, Transformer
from services.common.grpc_setup import Endpoint, StatusError, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle, StartupError
from services.common.loaded_model import LoadedModel, use_threads
from services.common.model_facts import TOKENIZER_METADATA, ModelFacts, ModelMismatch
from services.common.tls import security_of
from services.speculator.draft_service import DraftService
from services.speculator.drafter import Drafter
from services.speculator.lookup import OutputLookup, PromptLookup
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.session import DrafterSettings
from services.speculator.settings import SpeculatorSettings
from services.speculator.sources import DraftSource
from speculation.calibration import Calibration, InvalidCalibration

log = logging.getLogger(__name__)

SERVICE = "specserve.v1.Speculator"

Context = grpc.aio.ServicerContext[speculator_pb2.SpeculateRequest, speculator_pb2.SpeculateResponse]


class Servicer(SpeculatorServicer):
    """One Speculate stream for each verifier; sessions end with their stream."""

    def __init__(
        self,
        service: DraftService,
        facts: list[ModelFacts],
        lifecycle: Lifecycle,
        metrics: SpeculatorMetrics,
    ) -> None:
        self._service = service
        self._facts = facts
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._streams = itertools.count(1)
        self._tokenizer = facts[0].tokenizer_identity if facts else None

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
                started = time.perf_counter()
                response = self._service.answer(stream, message)
                response.work_seconds = time.perf_counter() - started
                self._metrics.answer_seconds.observe(response.work_seconds)
                await context.write(response)
        except ValueError as error:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except asyncio.CancelledError:
            if not self._lifecycle.draining:
                raise
        finally:
            ending.cancel()
            self._metrics.streams.dec()
            self._service.end(stream)

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


@asynccontextmanager
async def serve(settings: SpeculatorSettings, lifecycle: Lifecycle) -> AsyncIterator[None]:
    """Load the models, serve until the context ends."""
    security = security_of(settings)
    endpoint = Endpoint(settings.host, settings.port, settings.health_port)
    use_threads(settings.threads)
    loaded = _load(settings)
    metrics = SpeculatorMetrics(lifecycle.registry)
    vocab_size = loaded[0].facts.vocab_size if loaded else None
    models = [_drafter(settings, model) for model in loaded]
    service = DraftService(models, _lookups(settings, metrics), vocab_size, metrics)
    server = aio_server(lifecycle, exempt=frozenset({f"/{SERVICE}/Speculate"}))
    servicer = Servicer(service, [model.facts for model in loaded], lifecycle, metrics)
    add_SpeculatorServicer_to_server(servicer, server)
    async with serving_grpc(server, lifecycle, endpoint, security, (SERVICE,)):
        yield


def _load(settings: SpeculatorSettings) -> list[LoadedModel[Transformer]]:
    """Load every model; StartupError when one cannot be served or differs from the first in its tokens."""
    load = partial(Transformer.load, options=LoadOptions(settings.device, settings.dtype, settings.kernels))
    share = settings.kv_memory / max(1, len(settings.ssm))
    loaded = [LoadedModel.load(ssm, load, share, settings.max_sequences) for ssm in settings.ssm]
    for model in loaded:
        try:
            model.facts.check_drafts_for(loaded[0].facts)
        except ModelMismatch as error:
            raise StartupError(str(error)) from None
    return loaded


def _lookups(settings: SpeculatorSettings, metrics: SpeculatorMetrics) -> list[DraftSource]:
    lookups: list[DraftSource] = []
    if settings.prompt_lookup:
        lookups.append(PromptLookup(settings.min_confidence))
    if settings.suffix_index_tokens:
        outputs = OutputLookup(settings.min_confidence, settings.suffix_index_tokens)
        metrics.suffix_index_tokens.set_function(lambda: len(outputs.index))
        lookups.append(outputs)
    return lookups


def _drafter(settings: SpeculatorSettings, loaded: LoadedModel[Transformer]) -> Drafter:
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
