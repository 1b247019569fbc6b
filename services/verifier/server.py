"""The verifier's gRPC face: asyncio here, the engine's thread behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from protos.verifier_pb2_grpc import add_VerifierServicer_to_server
from runtime.parallel.group import Group
from runtime.parallel.model import LeadingModel, RankModel
from runtime.parallel.place import Place
from runtime.step_model import StepModel
from runtime.transformer import Transformer
from services.common.grpc_setup import Endpoint, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle, StartupError
from services.common.loaded_model import LoadedModel, use_threads
from services.common.model_facts import ModelFacts, ModelMismatch
from services.common.tls import security_of
from services.verifier.budget import DraftBudget, WholeDrafts
from services.verifier.drafts import DraftCollector, DraftSettings, DraftSource
from services.verifier.engine import Engine
from services.verifier.kept_file import KeptFile
from services.verifier.knowledge import VERSION, Knowledge
from services.verifier.local_speculator import Answers, LocalSpeculator
from services.verifier.measured_budget import MeasuredBudget
from services.verifier.metrics import VerifierMetrics
from services.verifier.outbox import Outbox
from services.verifier.ranks import joined, options_of
from services.verifier.runner import Runner
from services.verifier.scheduler import Scheduler, SchedulerSettings
from services.verifier.servicer import SERVICE, UNCOUNTED, Servicer
from services.verifier.settings import VerifierSettings
from services.verifier.speculator_link import SpeculatorLink
from services.verifier.step_times import StepTimes
from speculation.step_curve import StepCurve

log = logging.getLogger(__name__)


@asynccontextmanager
async def serve(
    settings: VerifierSettings,
    lifecycle: Lifecycle,
    place: Place | None = None,
    host: Callable[[CollectorRegistry], Answers] | None = None,
) -> AsyncIterator[None]:
    """Load the model, connect the speculators, serve until the context ends.

    place: of rank 0 in a group that torchrun started. host: makes a speculator that drafts in this process, beside the
    model; it gets the registry for its metrics.
    """
    security = security_of(settings, settings.tls_server_name)
    with joined(settings, place) as group:
        loaded = await asyncio.to_thread(_load, settings, group)
        metrics = VerifierMetrics(lifecycle.registry)
        runner = Runner(loaded.model, loaded.cache)
        outbox = Outbox(asyncio.get_running_loop())
        links = [SpeculatorLink(at, security, loaded.facts, metrics, outbox) for at in settings.speculator]
        sources: list[DraftSource] = [*links]
        if host is not None:
            hosted = await asyncio.to_thread(host, lifecycle.registry)
            sources.append(_local(hosted, loaded.facts, metrics))
        async with (
            _connected(links, settings.speculator_wait_s),
            _budget(settings, loaded, runner, sources, metrics) as budget,
        ):
            engine = _build_engine(settings, loaded, runner, budget, sources, metrics, lifecycle)
            server = aio_server(lifecycle, UNCOUNTED)
            add_VerifierServicer_to_server(Servicer(engine, loaded.facts, outbox, lifecycle), server)
            endpoint = Endpoint(settings.host, settings.port, settings.health_port)
            if group is not None:
                group.on_failure = engine.abort
            async with serving_grpc(server, lifecycle, endpoint, security, (SERVICE,)):
                engine.start()
                try:
                    yield
                finally:
                    await asyncio.to_thread(engine.stop)  # before the server: what is open ends with UNAVAILABLE


@asynccontextmanager
async def _connected(links: Sequence[SpeculatorLink], wait_s: float) -> AsyncIterator[None]:
    """Links that connect, each waited for so long; StartupError when one's models do not fit the LLM."""
    async with AsyncExitStack() as stack:
        for link in links:
            await stack.enter_async_context(link.connecting())
        try:
            for link in links:
                if not await link.wait_connected(wait_s):
                    log.warning("speculator not there yet; decoding starts without it", extra={"at": link.address})
        except ModelMismatch as error:
            raise StartupError(str(error)) from None
        yield


def _local(hosted: Answers, llm: ModelFacts, metrics: VerifierMetrics) -> LocalSpeculator:
    try:
        return LocalSpeculator(hosted, llm, metrics)
    except ModelMismatch as error:
        raise StartupError(str(error)) from None


def _load(settings: VerifierSettings, group: Group | None) -> LoadedModel[StepModel]:
    use_threads(settings.threads, 1 if group is None else group.place.local_ranks)
    options = options_of(settings, None if group is None else group.place)

    def load(folder: Path) -> StepModel:
        if group is None:
            return Transformer.load(folder, options)
        return LeadingModel(RankModel.load(folder, options, group), group)

    loaded = LoadedModel.load(
        settings.llm, load, settings.kv_memory, settings.max_sequences, settings.kv_blocks, settings.model_name
    )
    loaded.capture(lambda: loaded.model.prepare_steps(settings.max_sequences))
    return loaded


def _most_nodes(settings: VerifierSettings, loaded: LoadedModel[StepModel]) -> int:
    return settings.most_draft_nodes(loaded.model.device.type)


def _build_engine(
    settings: VerifierSettings,
    loaded: LoadedModel[StepModel],
    runner: Runner,
    budget: DraftBudget[Any],
    sources: Sequence[DraftSource],
    metrics: VerifierMetrics,
    lifecycle: Lifecycle,
) -> Engine:
    bounds = SchedulerSettings(
        max_sequences=settings.max_sequences,
        max_step_rows=settings.max_step_rows,
        prefill_chunk=settings.prefill_chunk,
        draft_nodes=_most_nodes(settings, loaded) if sources else 0,
        draft_depth=settings.draft_depth,
    )
    drafting = DraftSettings(settings.acceptance, settings.draft_width, settings.draft_timeout_ms / 1000)
    return Engine(
        runner,
        Scheduler(bounds, loaded.cache, loaded.facts.context_length),
        DraftCollector(sources, drafting, budget),
        metrics,
        settings.max_waiting,
        lifecycle.fail,
    )


@asynccontextmanager
async def _budget(
    settings: VerifierSettings,
    loaded: LoadedModel[StepModel],
    runner: Runner,
    sources: Sequence[DraftSource],
    metrics: VerifierMetrics,
) -> AsyncIterator[DraftBudget[Any]]:
    """One that measures keeps what it learns over restarts."""
    if settings.draft_always or settings.draft_width or not (sources and _most_nodes(settings, loaded)):
        yield WholeDrafts()
        return
    knowledge = await asyncio.to_thread(_knowledge, settings, loaded, runner, sources)
    curve = knowledge.budget.curve
    for rows in curve.points:
        metrics.step_curve.labels(rows).set_function(partial(curve.seconds, rows))
    async with knowledge.kept():
        yield knowledge.budget


def _knowledge(
    settings: VerifierSettings, loaded: LoadedModel[StepModel], runner: Runner, sources: Sequence[DraftSource]
) -> Knowledge:
    """Measures the steps of the model, which takes a second or two, unless it is known what they take."""
    bounds = (_most_nodes(settings, loaded), settings.draft_depth)
    most_rows = min(settings.max_step_rows, settings.max_sequences * (1 + bounds[0]))
    times = StepTimes(settings.step_times, loaded, (settings.tensor_parallel, settings.pipeline_parallel))
    points = times.points(runner, most_rows)
    facts = {
        **times.facts,
        "drafting": VERSION,
        "models": sorted(name for source in sources for name in source.names),
        "elsewhere": sorted(source.elsewhere for source in sources),
        "bounds": bounds,
    }
    file = KeptFile("drafting", settings.step_times, facts)
    return Knowledge(file, lambda: MeasuredBudget(StepCurve(points), *bounds))
