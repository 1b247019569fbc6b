"""Decodes prompts with the verifier's own engine, in this process, and counts its steps."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.lines import DEPTH, LOOKUPS
from benchmarks.acceptance.runners import Tokens
from services.speculator.draft_service import DraftService
from services.speculator.hosting import HostedSpeculator
from services.speculator.lookup import OutputLookup, PromptLookup
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.settings import SpeculatorSettings
from services.speculator.sources import DraftSource
from services.verifier.budget import WholeDrafts
from services.verifier.drafts import DraftCollector, DraftSettings
from services.verifier.engine import Engine
from services.verifier.local_speculator import NAME, LocalSpeculator
from services.verifier.metrics import VerifierMetrics
from services.verifier.request import GenerationRequest, Sink, StepOutput
from services.verifier.runner import Runner
from services.verifier.scheduler import Scheduler, SchedulerSettings
from speculation.acceptance import AcceptanceRule
from speculation.noise import derive_seed
from speculation.sampling import SamplingParams
from speculation.tree import MAX_NODES

TIMEOUT_S = 600.0  # of one step
INDEXED_TOKENS = 100_000  # more than one run writes

FAILED = {"speculator": NAME, "reason": "failed"}

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


def decode(
    bench: Bench, runner: Runner, drafting: Drafting, prompts: Sequence[Tokens], new_tokens: int, seed: int
) -> Decoded:
    """Decode all prompts together, each up to end-of-text or `new_tokens`.

    Raises:
        InvalidRequest: a prompt and its new tokens exceed the LLM's context. StepFailed: a step broke. RuntimeError: a
            draft did.
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
    if registry.get_sample_value("specserve_verifier_speculator_failures_total", FAILED):
        raise RuntimeError("drafting failed: the figures would be those of plain decoding")
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
    speculator = _speculator(bench, drafting, metrics)
    settings = DraftSettings(sampling_rule(drafting.rule), drafting.widths, TIMEOUT_S)
    scheduler = Scheduler(bounds, runner.cache, context)

    def fail(error: BaseException) -> None:
        outputs.put((0, RuntimeError(f"the engine broke: {error!r}")))

    return Engine(runner, scheduler, DraftCollector([speculator], settings, WholeDrafts()), metrics, sequences, fail)


def _speculator(bench: Bench, drafting: Drafting, metrics: VerifierMetrics) -> LocalSpeculator:
    """Look-up starts with nothing in every run: the texts are the same in all."""
    names = [name for name in drafting.sources if name not in LOOKUPS]
    floor = SpeculatorSettings(insecure=True).min_confidence
    lookups: list[DraftSource] = []
    if PromptLookup.name in drafting.sources:
        lookups.append(PromptLookup(floor))
    if OutputLookup.name in drafting.sources:
        lookups.append(OutputLookup(floor, INDEXED_TOKENS))
    models, llm = [bench.models[name] for name in names], bench.llm.facts
    service = DraftService(models, lookups, llm.vocab_size, SpeculatorMetrics(CollectorRegistry()))
    return LocalSpeculator(HostedSpeculator(service, [bench.facts[name] for name in names]), llm, metrics)


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
