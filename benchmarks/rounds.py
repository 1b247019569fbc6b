"""Runs every configuration over all prompts, round by round, with nothing else running."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.client import CompletionClient, Prompt, VerifierClient
from benchmarks.configurations import BEST_FIRST, PLAIN, Configuration
from benchmarks.load import LoadSample, measure_load, stream_load
from benchmarks.peers.batched_bench import llama_step_times
from benchmarks.peers.home import LLAMA_CPP
from benchmarks.samples import LatencyPair, PeerSteps, Sample, StepTimes, Trial
from benchmarks.servers import Models, Served, Servers
from benchmarks.workers import hugging_face_answers, step_times
from services.common.grpc_setup import channel
from services.common.model_files import resolve_model
from services.common.tls import INSECURE
from services.gateway.tokenizer import GatewayTokenizer

WARM_UP_TOKENS = 16
# Which of several settings is fastest is tried on a few answers.
TRIAL_PROMPTS, TRIAL_TOKENS = 3, 48
# These stacks also answer without the gateway, for the table of what it adds.
LATENCY_OF = (PLAIN.key, BEST_FIRST.key)
# The step times of ours and theirs take turns.
STEP_TURNS = 3
STEP_CONTEXT = 128
PEER_ROWS = (1, 4, 8)


@dataclass(frozen=True)
class Task:
    """What every configuration has to do."""

    models: Models
    prompts: tuple[str, ...]
    new_tokens: int
    rounds: int


@dataclass
class Measurements:
    """Grows while the benchmark runs."""

    samples: list[Sample] = field(default_factory=list)
    latency: list[LatencyPair] = field(default_factory=list)
    steps: list[StepTimes] = field(default_factory=list)
    peer_steps: list[PeerSteps] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    load: list[LoadSample] = field(default_factory=list)


class Benchmark:
    """Runs the configurations of a task one at a time.

    tick: is told the key of each that answered. tell: gets a line for each setting that was tried.
    """

    def __init__(self, task: Task, servers: Servers, tick: Callable[[str], None], tell: Callable[[str], None]) -> None:
        self.task = task
        self.measured = Measurements()
        self._servers = servers
        self._tick = tick
        self._tell = tell
        tokenizer = GatewayTokenizer.from_folder(Path(resolve_model(task.models.llm)))
        # Token ids, so that no server's own tokenizer makes a difference.
        self._ids: list[Prompt] = [tokenizer.encode(prompt) for prompt in task.prompts]

    @property
    def models(self) -> Models:
        return self.task.models

    async def fastest(self, candidates: Sequence[Configuration]) -> Configuration:
        """Tries settings of a row on a few answers, keeps what was tried, and gives the fastest."""
        tokens = min(TRIAL_TOKENS, self.task.new_tokens)
        trials = []
        for candidate in candidates:
            answers = [s.answer async for s in self._answers(candidate, 0, TRIAL_PROMPTS, tokens)]
            trials.append(Trial(candidate.title, median(answer.ms_per_token for answer in answers)))
            self._tick(candidate.key)
            self._tell(f"{candidate.title}: {trials[-1].ms_per_token:.2f} ms per token")
        self.measured.trials += trials
        return min(zip(candidates, trials, strict=True), key=lambda pair: pair[1].ms_per_token)[0]

    async def learn(self, configurations: Sequence[Configuration], streams: Sequence[int]) -> None:
        """Serves each load once, unmeasured: budgets of drafts keep over restarts what they learn of it."""
        for configuration in configurations:
            for count in streams:
                async with self._client(configuration, count) as (client, _):
                    await asyncio.to_thread(stream_load, client, self._ids, self.task.new_tokens, count)
                self._tick(configuration.key)

    async def run_rounds(self, configurations: Sequence[Configuration]) -> None:
        """All rounds; every other one goes through the configurations in reverse."""
        for turn in range(self.task.rounds):
            for configuration in configurations[:: 1 if turn % 2 == 0 else -1]:
                if configuration.key in LATENCY_OF:
                    await self._measure_twice(configuration, turn)
                    continue
                async for sample in self._answers(configuration, turn, len(self._ids), self.task.new_tokens):
                    self.measured.samples.append(sample)
                    self._tick(configuration.key)

    async def run_load(self, configurations: Sequence[Configuration], streams: Sequence[int]) -> None:
        """Several streams at once, in rounds of opposite order."""
        for turn in range(self.task.rounds):
            for count in streams:
                for configuration in configurations[:: 1 if turn % 2 == 0 else -1]:
                    async with self._client(configuration, count) as (client, _):
                        sample = await asyncio.to_thread(
                            measure_load, client, configuration.key, self._ids, self.task.new_tokens, count, turn
                        )
                    self.measured.load.append(sample)
                    self._tick(configuration.key)

    async def measure_steps(self, beside: Sequence[Configuration]) -> None:
        """Step times of the LLM in turns with those of llama.cpp's settings `beside`, then of each SSM."""
        models = self.task.models
        options = {"device": models.device, "context": STEP_CONTEXT}
        ours, theirs = [], []
        for _ in range(STEP_TURNS if beside else 1):
            ours.append(await step_times(options | {"model": models.llm, "threads": models.threads}))
            theirs.append([await self._llama_steps(configuration) for configuration in beside])
        self.measured.steps.append(_median_steps(ours))
        self.measured.peer_steps += [_median_peer_steps(own) for own in zip(*theirs, strict=True)]
        for ssm in models.ssms:
            self.measured.steps.append(await step_times(options | {"model": ssm, "threads": 1}))

    async def _llama_steps(self, configuration: Configuration) -> PeerSteps:
        servers = self._servers
        model = servers.gguf(self.task.models.llm, configuration.dtype)
        folder, threads = servers.peers.folders[LLAMA_CPP], self.task.models.cores
        times = await llama_step_times(folder, model, PEER_ROWS, STEP_CONTEXT, threads, configuration.flags)
        return PeerSteps(configuration.title, dict(times))

    @asynccontextmanager
    async def _client(
        self, configuration: Configuration, streams: int = 1
    ) -> AsyncIterator[tuple[CompletionClient, Served]]:
        """A client of the running and warm server of a configuration."""
        async with self._servers.serving(configuration, streams) as served:
            client = await asyncio.to_thread(CompletionClient.connect, served.url)
            await asyncio.to_thread(client.complete, self._ids[0], min(WARM_UP_TOKENS, self.task.new_tokens))
            yield client, served

    async def _answers(
        self, configuration: Configuration, turn: int, prompts: int, new_tokens: int
    ) -> AsyncIterator[Sample]:
        if configuration.engine == "transformers":
            async for sample in self._hugging_face(configuration, turn, prompts, new_tokens):
                yield sample
            return
        async with self._client(configuration) as (client, _):
            for prompt, ids in enumerate(self._ids[:prompts]):
                answer = await asyncio.to_thread(client.complete, ids, new_tokens)
                yield Sample(configuration.key, prompt, turn, answer)

    async def _hugging_face(
        self, configuration: Configuration, turn: int, prompts: int, new_tokens: int
    ) -> AsyncIterator[Sample]:
        models = self.task.models
        options = {
            "llm": models.llm,
            "assistant": models.ssms[0] if configuration.drafts else None,
            "dtype": configuration.dtype,
            "new_tokens": new_tokens,
            "device": models.device,
            "threads": models.threads,
        }
        prompt = 0
        async for answer in hugging_face_answers(list(self.task.prompts[:prompts]), options):
            yield Sample(configuration.key, prompt, turn, answer)
            prompt += 1

    async def _measure_twice(self, configuration: Configuration, turn: int) -> None:
        """Through the gateway and past it, which of the two first in turns."""
        async with self._client(configuration) as (client, served):
            assert served.verifier is not None
            with channel(served.verifier, INSECURE) as connection:
                direct = VerifierClient(connection, self.task.models.llm)
                for prompt in range(len(self._ids)):
                    await asyncio.to_thread(self._ask_twice, configuration, turn, prompt, client, direct)
                    self._tick(configuration.key)

    def _ask_twice(
        self, configuration: Configuration, turn: int, prompt: int, gateway: CompletionClient, direct: VerifierClient
    ) -> None:
        ids, new_tokens = self._ids[prompt], self.task.new_tokens
        direct_first = (prompt + turn) % 2 == 1
        before = direct.complete(ids, new_tokens) if direct_first else None
        answer = gateway.complete(ids, new_tokens)
        self.measured.samples.append(Sample(configuration.key, prompt, turn, answer))
        pair = LatencyPair(configuration.key, prompt, turn, answer, before or direct.complete(ids, new_tokens))
        self.measured.latency.append(pair)


def _median_steps(turns: Sequence[StepTimes]) -> StepTimes:
    medians = {count: median(turn.median_ms[count] for turn in turns) for count in turns[0].median_ms}
    return dataclasses.replace(turns[0], median_ms=medians)


def _median_peer_steps(turns: Sequence[PeerSteps]) -> PeerSteps:
    """llama-batched-bench leaves a number of rows out now and then, without a word."""
    rows = sorted({n for turn in turns for n in turn.ms})
    return PeerSteps(turns[0].title, {n: median(turn.ms[n] for turn in turns if n in turn.ms) for n in rows})
