"""A completion under way: its choices run side by side, each from the verifier's steps to pieces of text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from services.gateway.choice import ChoiceText, Delta, PromptText
from services.gateway.generation import GenerationRequest
from services.gateway.metrics import GatewayMetrics
from services.gateway.plan import CompletionPlan
from services.gateway.records import Records
from services.gateway.replicas import Replicas
from services.gateway.tokenizer import GatewayTokenizer
from services.gateway.verifier import Generation, ResumePolicy

# The text of more prompt tokens is made in a thread of its own.
INLINE_TOKENS = 1024
# Takes the next piece of a choice, by the choice's index; called for one piece at a time.
Sink = Callable[[int, Delta], Awaitable[None]]


@dataclass
class Usage:
    """Tokens of a request so far, and the LLM's steps behind the completion's."""

    prompt_tokens: int
    completion_tokens: int = 0
    llm_steps: int = 0


class Completion:
    """Runs a plan: `admit`, then `run`; `cancel` at the end, whatever happened.

    arrived: time.monotonic() of the request's arrival.
    """

    def __init__(
        self,
        plan: CompletionPlan,
        tokenizer: GatewayTokenizer,
        verifiers: Replicas,
        records: Records,
        metrics: GatewayMetrics,
        *,
        arrived: float,
        resume: ResumePolicy,
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._prompts: list[PromptText] = []
        self._records = records
        self._metrics = metrics
        self._arrived = arrived
        self._lock = asyncio.Lock()
        self._generations = [
            Generation(verifiers, sequence, resume, metrics.retries.inc)
            for sequence in plan.sequences
            if _needs_verifier(sequence)
        ]
        self._llm_steps = [0] * len(plan.sequences)
        self.usage = Usage(plan.prompt_tokens)
        self.first_token_at: float | None = None

    async def admit(self) -> None:
        """Return once verifiers have admitted every choice; VerifierError, and none stays, when one is refused."""
        whole = self._plan.request.echo or self._plan.request.logprobs is not None
        if whole and self._plan.prompt_tokens > INLINE_TOKENS:
            self._prompts = await asyncio.to_thread(self._read_prompts, whole)
        else:
            self._prompts = self._read_prompts(whole)
        await _together(generation.open() for generation in self._generations)

    async def run(self, sink: Sink) -> None:
        """Bring the pieces of all choices to the sink, the last one of each with its finish reason; VerifierError."""
        if not self._generations:
            for index in range(len(self._plan.sequences)):
                await sink(index, self._choice_text(index).prompt_only())
            return
        await _together(self._run_choice(index, sink) for index in range(len(self._generations)))

    def _read_prompts(self, whole: bool) -> list[PromptText]:
        return [PromptText(self._tokenizer, prompt, whole=whole) for prompt in self._plan.prompts]

    def cancel(self) -> None:
        """Free what the verifiers still hold."""
        for generation in self._generations:
            generation.cancel()

    async def _run_choice(self, index: int, sink: Sink) -> None:
        text = self._choice_text(index)
        generation = self._generations[index]
        last = None
        with self._metrics.open_streams.track_inprogress():
            async with aclosing(generation.steps()) as steps:
                async for step in steps:
                    delta = text.push(step)
                    stopped_early = delta.finish_reason is not None and step.finish_reason is None
                    if stopped_early:
                        generation.cancel()
                    last = self._account(index, delta, last)
                    async with self._lock:
                        await sink(index, delta)
                    if stopped_early:
                        return

    def _choice_text(self, index: int) -> ChoiceText:
        request = self._plan.request
        prompt = self._prompts[index // request.n]
        return ChoiceText(prompt, stop=request.stop, echo=request.echo, report=request.logprobs is not None)

    def _account(self, index: int, delta: Delta, last: float | None) -> float:
        """Count a piece that came after `last`; returns its time."""
        now = time.monotonic()
        tokens = len(delta.token_ids)
        if tokens:
            if self.first_token_at is None:
                self.first_token_at = time.time()
                self._metrics.time_to_first_token.observe(now - self._arrived)
            if last is not None:
                self._metrics.inter_token.observe((now - last) / tokens)
            self._records.add_tokens(self._plan.request_id, index, delta.token_ids)
        steps = delta.llm_steps - self._llm_steps[index]
        self._llm_steps[index] = delta.llm_steps
        self.usage.completion_tokens += tokens
        self.usage.llm_steps += steps
        self._metrics.completion_tokens.inc(tokens)
        self._metrics.llm_steps.inc(max(steps, 0))
        return now


def _needs_verifier(sequence: GenerationRequest) -> bool:
    return sequence.max_new_tokens > 0 or sequence.prompt_logprobs


async def _together(coroutines: Iterable[Coroutine[None, None, None]]) -> None:
    """Run all; when one fails cancel the others and raise what it raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in coroutines:
                tasks.create_task(coroutine)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
