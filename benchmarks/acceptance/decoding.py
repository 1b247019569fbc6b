"""Decodes prompts with the verifier's own engine, in this process, and counts its steps."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.lines import DEPTH, LOOKUPS
from benchmarks.acceptance.runners import Tokens
from protos import speculator_pb2
from services.speculator.draft_service import DraftService
from services.speculator.lookup import OutputLookup, PromptLookup
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.settings import SpeculatorSettings
from services.speculator.sources import DraftSource
from services.verifier import wire
from services.verifier.budget import WholeDrafts
from services.verifier.drafts import DraftCollector, DraftOrder, DraftSettings
from services.verifier.engine import Engine
from services.verifier.metrics import VerifierMetrics
from services.verifier.request import GenerationRequest, Sink, StepOutput
from services.verifier.runner import Runner
from services.verifier.scheduler import Scheduler, SchedulerSettings
from services.verifier.sequence import Sequence as RunningSequence
from speculation.acceptance import AcceptanceRule
from speculation.noise import derive_seed
from speculation.sampling import SamplingParams
from speculation.tree import MAX_NODES, TokenTree

STREAM = 0
TIMEOUT_S = 600.0  # of one step
INDEXED_TOKENS = 100_000  # more than one run writes

Outputs = queue.SimpleQueue[tuple[int, StepOutput | Exception]]


def sampling(rule: AcceptanceRule, seed: int, prompt: int) -> SamplingParams:
    """Greedy, or temperature 1 with a seed of its own for each prompt."""
    greedy = rule is AcceptanceRule.GREEDY
    return SamplingParams(temperature=0.0 if greedy else 1.0, seed=derive_seed(seed, prompt))


def sampling_rule(rule: AcceptanceRule) -> AcceptanceRule:
    """The rule to configure a verifier with whose requests shall be accepted by `rule`; any will do for greedy ones."""
    return AcceptanceRule.SHARED_NOISE if rule is AcceptanceRule.GREEDY else rule


@dataclass(frozen=True)
class Drafting:
    """How a run drafts: at most `nodes` nodes a step, from the trees of `sources` merged; 0 for plain decoding."""

    rule: AcceptanceRule
    nodes: int = 0
    widths: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoded:
    """What came of each prompt: outputs, and the LLM steps that each took. draft_nodes: of all trees together."""

    outputs: tuple[Tokens, ...]
    steps: tuple[int, ...]
    draft_nodes: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of output tokens of each prompt."""
        return tuple(map(len, self.outputs))


class LocalSpeculator:
    """A speculator without a network: a `services.verifier.drafts.DraftSource` around the service's own answers."""

    def __init__(self, service: DraftService, models: int, vocab_size: int) -> None:
        self.models = max(1, models)
        self._service = service
        self._vocab_size = vocab_size
        self._known: dict[int, int] = {}  # sequence id -> how many of its tokens the service has
        self._orders: dict[int, DraftOrder] = {}
        self._request = speculator_pb2.SpeculateRequest()

    def send(self, step: int, orders: Sequence[DraftOrder]) -> bool:
        self._orders = {order.sequence.id: order for order in orders}
        self._request = wire.speculate_request(step, orders, self._known)
        for order in orders:
            self._known[order.sequence.id] = len(order.sequence.tokens)
        return True

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
        response = self._service.answer(STREAM, self._request)
        return wire.read_drafts(response, self._orders, self._vocab_size)

    def forget(self, sequence: RunningSequence) -> None:
        if (known := self._known.pop(sequence.id, None)) is not None:
            message = speculator_pb2.SpeculateRequest()
            wire.add_endings(message, {sequence.id: sequence.tokens[known:]})
            self._service.answer(STREAM, message)

    def open(self, sequences: Sequence[RunningSequence]) -> None:
        """Prompts are computed with their first drafts."""

    def flush(self) -> None:
        """Endings are passed on at once."""


def decode(
    bench: Bench, runner: Runner, drafting: Drafting, prompts: Sequence[Tokens], new_tokens: int, seed: int
) -> Decoded:
    """Decode all prompts together, each up to end-of-text or `new_tokens`.

    Raises:
        InvalidRequest: a prompt and its new tokens exceed the LLM's context. StepFailed: a step broke.
    """
    registry = CollectorRegistry()
    outputs: Outputs = queue.SimpleQueue()
    engine = _engine(bench, runner, drafting, len(prompts), VerifierMetrics(registry), outputs)
    stop = frozenset(runner.model.config.eos_token_ids)
    for index, prompt in enumerate(prompts):
        params = sampling(drafting.rule, seed, index)
        request = GenerationRequest(str(index), prompt, params, new_tokens, stop_token_ids=stop)
        engine.submit(request, _sink(outputs, index))
    engine.start()
    try:
        texts, steps = _collect(outputs, len(prompts))
    finally:
        engine.stop()
    nodes = registry.get_sample_value("specserve_verifier_draft_tokens_total") or 0
    return Decoded(texts, steps, int(nodes))


def _engine(
    bench: Bench, runner: Runner, drafting: Drafting, sequences: int, metrics: VerifierMetrics, outputs: Outputs
) -> Engine:
    context = bench.llm.facts.context_length
    # No bound of a step ever shrinks a draft: figures are by the size of trees.
    bounds = SchedulerSettings(
        max_sequences=sequences,
        max_step_rows=sequences * (context + MAX_NODES),
        prefill_chunk=context,
        draft_nodes=drafting.nodes,
        draft_depth=DEPTH,
    )
    speculator = _speculator(bench, drafting)
    settings = DraftSettings(sampling_rule(drafting.rule), drafting.widths, TIMEOUT_S)
    scheduler = Scheduler(bounds, runner.cache, context)

    def fail(error: BaseException) -> None:
        outputs.put((0, RuntimeError(f"the engine broke: {error!r}")))

    return Engine(runner, scheduler, DraftCollector([speculator], settings, WholeDrafts()), metrics, sequences, fail)


def _speculator(bench: Bench, drafting: Drafting) -> LocalSpeculator:
    """Look-up starts with nothing in every run: the texts are the same in all."""
    models = [bench.models[name] for name in drafting.sources if name not in LOOKUPS]
    floor = SpeculatorSettings(insecure=True).min_confidence
    lookups: list[DraftSource] = []
    if PromptLookup.name in drafting.sources:
        lookups.append(PromptLookup(floor))
    if OutputLookup.name in drafting.sources:
        lookups.append(OutputLookup(floor, INDEXED_TOKENS))
    vocab_size = bench.llm.facts.vocab_size
    service = DraftService(models, lookups, vocab_size, SpeculatorMetrics(CollectorRegistry()))
    return LocalSpeculator(service, len(models), vocab_size)


def _sink(outputs: Outputs, index: int) -> Sink:
    return lambda output: outputs.put((index, output))


def _collect(outputs: Outputs, sequences: int) -> tuple[tuple[Tokens, ...], tuple[int, ...]]:
    texts: list[list[int]] = [[] for _ in range(sequences)]
    steps = [0] * sequences
    unfinished = sequences
    while unfinished:
        index, output = outputs.get(timeout=TIMEOUT_S)
        if isinstance(output, Exception):
            raise output
        texts[index].extend(output.token_ids)
        steps[index] = output.llm_steps
        unfinished -= output.finish_reason is not None
    return tuple(map(tuple, texts)), tuple(steps)
