"""Runs every configuration over all prompts, round by round, with nothing else running."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.client import GatewayClient, VerifierClient
from benchmarks.configurations import BEST_FIRST, PLAIN, Configuration
from benchmarks.samples import LatencyPair, Sample, StepTimes
from benchmarks.stack import ServiceOptions, running_stack
from benchmarks.workers import hugging_face_answers, step_times
from services.common.grpc_setup import channel
from services.common.tls import INSECURE
from services.launcher.settings import UpSettings

WARM_UP_TOKENS = 16
# Whether a row for bf16 is worth its time is tried on a few answers.
TRIAL_PROMPTS, TRIAL_TOKENS, CLEARLY_FASTER = 3, 48, 1.1
# These stacks also answer without the gateway, for the table of what it adds.
LATENCY_OF = (PLAIN.key, BEST_FIRST.key)


@dataclass(frozen=True)
class Task:
    """What every configuration has to do. device: "cpu", "cuda", ... threads: 0 for all cores."""

    llm: str
    ssms: tuple[str, ...]
    prompts: tuple[str, ...]
    new_tokens: int
    rounds: int
    device: str
    threads: int


@dataclass
class Measurements:
    """Grows while the benchmark runs."""

    samples: list[Sample] = field(default_factory=list)
    latency: list[LatencyPair] = field(default_factory=list)
    steps: list[StepTimes] = field(default_factory=list)


class Benchmark:
    """Runs the configurations of a task one at a time. on_line: gets log lines of the services; tick: each sample."""

    def __init__(self, task: Task, on_line: Callable[[str], None], tick: Callable[[Configuration], None]) -> None:
        self.task = task
        self.measured = Measurements()
        self._on_line = on_line
        self._tick = tick

    async def is_clearly_faster(self, configuration: Configuration, than: Configuration) -> bool:
        """Compares two Hugging Face configurations on a few answers."""
        prompts = self.task.prompts[:TRIAL_PROMPTS]
        trial = dataclasses.replace(self.task, prompts=prompts, new_tokens=min(TRIAL_TOKENS, self.task.new_tokens))
        ms = [
            median([sample.answer.ms_per_token async for sample in _hugging_face(trial, candidate, 0)])
            for candidate in (configuration, than)
        ]
        return CLEARLY_FASTER * ms[0] < ms[1]

    async def run_rounds(self, configurations: Sequence[Configuration]) -> None:
        """All rounds; every other one goes through the configurations in reverse."""
        for turn in range(self.task.rounds):
            for configuration in configurations[:: 1 if turn % 2 == 0 else -1]:
                if configuration.engine == "specserve":
                    await self._run_stack(configuration, turn)
                else:
                    async for sample in _hugging_face(self.task, configuration, turn):
                        self.measured.samples.append(sample)
                        self._tick(configuration)

    async def measure_steps(self) -> None:
        """Step times of the LLM, then of each SSM."""
        for model, threads in ((self.task.llm, self.task.threads), *((ssm, 1) for ssm in self.task.ssms)):
            options = {"model": model, "device": self.task.device, "threads": threads}
            self.measured.steps.append(await step_times(options))

    async def _run_stack(self, configuration: Configuration, turn: int) -> None:
        task = self.task
        up = UpSettings(
            llm=task.llm,
            ssm=task.ssms[: configuration.ssms],
            speculator=configuration.drafts,
            speculator_per_ssm=configuration.apart,
            threads=task.threads,
        )
        device = {"device": task.device}
        options: ServiceOptions = {
            "verifier": device | configuration.verifier,
            "speculator": device | configuration.speculator,
        }
        async with running_stack(up, options, self._on_line) as stack:
            with channel(stack.verifier, INSECURE) as connection:
                gateway = await asyncio.to_thread(GatewayClient.connect, stack.url)
                direct = VerifierClient(connection, task.llm) if configuration.key in LATENCY_OF else None
                await asyncio.to_thread(gateway.complete, task.prompts[0], min(WARM_UP_TOKENS, task.new_tokens))
                for prompt in range(len(task.prompts)):
                    await asyncio.to_thread(self._ask, configuration, turn, prompt, gateway, direct)
                    self._tick(configuration)

    def _ask(
        self,
        configuration: Configuration,
        turn: int,
        prompt: int,
        gateway: GatewayClient,
        direct: VerifierClient | None,
    ) -> None:
        text, new_tokens = self.task.prompts[prompt], self.task.new_tokens
        direct_first = (prompt + turn) % 2 == 1
        before = direct.complete(text, new_tokens) if direct is not None and direct_first else None
        answer = gateway.complete(text, new_tokens)
        self.measured.samples.append(Sample(configuration.key, prompt, turn, answer))
        if direct is not None:
            pair = LatencyPair(configuration.key, prompt, turn, answer, before or direct.complete(text, new_tokens))
            self.measured.latency.append(pair)


async def _hugging_face(task: Task, configuration: Configuration, turn: int) -> AsyncIterator[Sample]:
    options = {
        "llm": task.llm,
        "assistant": task.ssms[0] if configuration.drafts else None,
        "dtype": configuration.dtype,
        "new_tokens": task.new_tokens,
        "device": task.device,
        "threads": task.threads,
    }
    prompt = 0
    async for answer in hugging_face_answers(list(task.prompts), options):
        yield Sample(configuration.key, prompt, turn, answer)
        prompt += 1
