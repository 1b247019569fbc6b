"""Decodes prompts with the verifier's own engine, in this process, and counts its steps."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from benchmarks.acceptance.bench import Bench, Source
from benchmarks.acceptance.lines import DEPTH
from benchmarks.acceptance.runners import Tokens
from services.speculator.drafter import DraftOrder as SpeculatorOrder
from services.speculator.drafter import SessionKey
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
    """A speculator without a wire: a `services.verifier.drafts.DraftSource` around sources in this process."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._known: dict[int, int] = {}  # sequence id -> how many of its tokens the sources have
        self._orders: list[DraftOrder] = []

    @property
    def models(self) -> int:
        return len(self._sources)

    def send(self, step: int, orders: Sequence[DraftOrder]) -> bool:
        self._orders = list(orders)
        return True

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
        for order in self._orders:
            self._tell(order.sequence)
        wanted = [
            SpeculatorOrder((STREAM, order.sequence.id), order.nodes, order.depth, order.widths, order.selection)
            for order in self._orders
        ]
        grown = [source.draft(wanted) for source in self._sources]
        return {order.key[1]: [trees[order.key] for trees in grown if order.key in trees] for order in wanted}

    def forget(self, sequence_id: int) -> None:
        if self._known.pop(sequence_id, None) is not None:
            for source in self._sources:
                source.close((STREAM, sequence_id))

    def flush(self) -> None:
        """Endings are passed on at once."""

    def close(self) -> None:
        """The sources live on for the next run."""

    def _tell(self, sequence: RunningSequence) -> None:
        key: SessionKey = (STREAM, sequence.id)
        known, self._known[sequence.id] = self._known.get(sequence.id), len(sequence.tokens)
        for source in self._sources:
            if known is None:
                source.open(key, sequence.tokens, len(sequence.request.prompt), sequence.request.sampling)
            else:
                source.advance(key, sequence.tokens[known:])


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
        max_draft_rows=sequences * drafting.nodes,
    )
    speculator = LocalSpeculator([bench.sources[name] for name in drafting.sources])
    settings = DraftSettings(sampling_rule(drafting.rule), drafting.widths, TIMEOUT_S)
    scheduler = Scheduler(bounds, runner.cache, context)

    def fail(error: BaseException) -> None:
        outputs.put((0, RuntimeError(f"the engine broke: {error!r}")))

    return Engine(runner, scheduler, DraftCollector([speculator], settings), metrics, sequences, fail)


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
