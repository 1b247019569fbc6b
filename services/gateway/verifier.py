"""A generation that survives the loss of its verifier."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from services.gateway.generation import (
    GenerationRequest,
    Step,
    VerifierBusy,
    VerifierError,
    VerifierUnavailable,
)
from services.gateway.replicas import Replicas
from services.gateway.verifier_client import RemoteSequence

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True)
class ResumePolicy:
    """How long a generation that lost its verifier waits for one, and how often it tries."""

    timeout_s: float
    attempts: int


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
    """One sequence on a verifier; goes on with another attempt when the verifier is lost in the middle.

    A sequence that no verifier admits is not retried: its client still has the request, and learns at once. Resuming,
    on any verifier, sends the tokens so far along, so that the text goes on as if nothing had happened; there full
    queues are waited for, too.

    on_retry: called before each attempt to resume.
    """

    def __init__(
        self,
        replicas: Replicas,
        request: GenerationRequest,
        policy: ResumePolicy,
        on_retry: Callable[[], None],
    ) -> None:
        self._replicas = replicas
        self._policy = policy
        self._on_retry = on_retry
        self._request = request
        self._generated: list[int] = []
        self._steps_before = 0
        self._steps = 0
        self._sequence: RemoteSequence | None = None
        self._outage: _Outage | None = None

    async def open(self, *, again: bool = False) -> None:
        """Return once a verifier has admitted the sequence; VerifierError if none does. again: after a loss."""
        self._sequence = await self._replicas.open(self._request, self._generated, meet=again)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """The steps up to the one with a finish reason; `open` first."""
        assert self._sequence is not None, "open the generation first"
        while True:
            try:
                async for step in self._sequence.steps():
                    yield self._keep(step)
                return
            except VerifierUnavailable as error:
                log.warning("verifier lost", extra={"reason": str(error), "tokens": len(self._generated)})
                await self._resume(error)

    def cancel(self) -> None:
        """Free what the sequence holds on its verifier."""
        if self._sequence is not None:
            self._sequence.cancel()

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
        self._outage = self._outage or _Outage(self._policy)
        while True:
            await self._outage.wait(lost)
            self._on_retry()
            try:
                await self.open(again=True)
                return
            except (VerifierUnavailable, VerifierBusy) as error:
                lost = error
