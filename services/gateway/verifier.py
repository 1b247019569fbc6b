"""The verifier as a partner that may go away and come back."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from services.gateway.generation import (
    GenerationRequest,
    ModelFacts,
    ModelMismatch,
    Step,
    VerifierBusy,
    VerifierError,
    VerifierTimeout,
    VerifierUnavailable,
)
from services.gateway.wire import GenerateStream, VerifierClient

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True)
class ResumePolicy:
    """How long a generation that lost its verifier waits for one, and how often it tries."""

    timeout_s: float
    attempts: int


class Verifier:
    """A verifier whose model is the gateway's.

    tokenizer_hash: hash of the gateway's own tokenizer; a verifier with another one is refused with ModelMismatch.
    on_retry: called before each attempt to resume a generation.
    """

    def __init__(
        self,
        client: VerifierClient,
        tokenizer_hash: str,
        connect_timeout_s: float,
        resume: ResumePolicy,
        on_retry: Callable[[], None],
    ) -> None:
        self.client = client
        self._tokenizer_hash = tokenizer_hash
        self._connect_timeout_s = connect_timeout_s
        self.resume = resume
        self.on_retry = on_retry
        self._facts: ModelFacts | None = None

    async def facts(self) -> ModelFacts:
        """Facts of the model, as of the last time that the verifier was met."""
        return self._facts or await self.meet()

    async def meet(self, model: str | None = None) -> ModelFacts:
        """Ask for the model facts and check them; VerifierUnavailable or ModelMismatch otherwise.

        model: the name that it must have, if it matters.
        """
        facts = await self.client.model_facts(self._connect_timeout_s)
        if model not in (None, facts.model):
            raise ModelMismatch(f"the request began with model {model}; the verifier now serves {facts.model}")
        if facts.tokenizer_hash != self._tokenizer_hash:
            self._facts = None
            raise ModelMismatch(
                f"tokenizer hash {self._tokenizer_hash} of the gateway != {facts.tokenizer_hash} of the verifier at "
                f"{self.client.address} (model {facts.model}); start both with the same model"
            )
        if facts != self._facts:
            log.info("verifier met", extra={"address": self.client.address, "model": facts.model})
        self._facts = facts
        return facts

    async def serving(self) -> bool:
        """Whether the verifier's health check says that it takes requests."""
        return await self.client.serving(self._connect_timeout_s)

    async def watch(self) -> NoReturn:
        """Stay connected, and meet the verifier anew whenever it may be another one than before."""
        while True:
            await self.client.wait_connected()
            try:
                await self.meet()
            except VerifierError as error:
                log.error("verifier not usable", extra={"reason": str(error)})
            await self.client.wait_disconnected()
            log.warning("verifier disconnected", extra={"address": self.client.address})
            self._facts = None


class _Outage:
    """How long a generation has been without its verifier: from the loss to the next token."""

    def __init__(self, policy: ResumePolicy) -> None:
        self._attempts_left = policy.attempts
        self._give_up = asyncio.get_running_loop().time() + policy.timeout_s
        self._backoff_s = FIRST_BACKOFF_S

    async def wait(self, reason: VerifierError) -> None:
        """Return when it is time for another attempt; raise the reason when there is none left."""
        wait_s = self._backoff_s * random.uniform(0.5, 1.0)
        if isinstance(reason, VerifierBusy):
            wait_s = max(wait_s, reason.retry_after_ms / 1000)
        if self._attempts_left == 0 or asyncio.get_running_loop().time() + wait_s > self._give_up:
            raise reason
        self._attempts_left -= 1
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        await asyncio.sleep(wait_s)


class Generation:
    """One sequence on the verifier; goes on at another attempt when the verifier is lost in the middle.

    A sequence that was never admitted is not retried: its client still has the request, and learns at once. Resuming
    sends the tokens so far along, so that the text goes on as if nothing had happened; there a full queue is waited
    for, too.

    deadline: time of the running event loop by which the generation must end.
    """

    def __init__(self, verifier: Verifier, request: GenerationRequest, deadline: float) -> None:
        self._verifier = verifier
        self._request = request
        self._deadline = deadline
        self._generated: list[int] = []
        self._steps_before = 0
        self._steps = 0
        self._stream: GenerateStream | None = None
        self._outage: _Outage | None = None

    async def open(self) -> None:
        """Return once the verifier has admitted the sequence; VerifierError if it does not."""
        left = self._deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise VerifierTimeout("the request's time is over")
        self._stream = self._verifier.client.generate(self._request, self._generated, left)
        await self._stream.admitted()

    async def steps(self) -> AsyncGenerator[Step, None]:
        """The steps up to the one with a finish reason; `open` first."""
        assert self._stream is not None, "open the generation first"
        while True:
            try:
                async for step in self._stream.steps():
                    yield self._keep(step)
                return
            except VerifierUnavailable as error:
                log.warning("verifier lost", extra={"reason": str(error), "tokens": len(self._generated)})
                await self._resume(error)

    def cancel(self) -> None:
        """Free what the sequence holds on the verifier."""
        if self._stream is not None:
            self._stream.cancel()

    def _keep(self, step: Step) -> Step:
        """Remember what a next attempt needs to know."""
        self._outage = None
        self._generated += step.token_ids
        self._steps = self._steps_before + step.llm_steps
        if self._request.prompt_logprobs:
            self._request = replace(self._request, prompt_logprobs=False)
        return replace(step, llm_steps=self._steps)

    async def _resume(self, lost: VerifierError) -> None:
        """Open the sequence again within the policy's bounds, or raise the last reason why it could not be."""
        self._steps_before = self._steps
        self._outage = self._outage or _Outage(self._verifier.resume)
        while True:
            await self._outage.wait(lost)
            self._verifier.on_retry()
            try:
                await self._verifier.meet(self._request.model)
                await self.open()
                return
            except (VerifierUnavailable, VerifierBusy) as error:
                lost = error
