"""A speculator in the verifier's own process: it is told what a remote one is told, by a call.

It saves the way there and back at every step, and shares the verifier's threads, which take turns anyway. Its failures
it may not share: one costs the drafts of some steps and no token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from services.common.drafting import SpeculateRequest, SpeculateResponse
from services.common.model_facts import ModelFacts
from services.verifier.draft_dialogue import DraftDialogue
from services.verifier.drafts import DraftOrder
from services.verifier.metrics import VerifierMetrics
from services.verifier.sequence import Sequence as RunningSequence
from speculation.tree import TokenTree

log = logging.getLogger(__name__)

NAME = "local"
# For so long no draft is asked for after a failure.
REST_S = 10.0


class Answers(Protocol):
    """Drafts for one verifier, whose engine's thread alone calls it."""

    @property
    def facts(self) -> Sequence[ModelFacts]:
        """Of its small models; empty when it drafts by look-up alone."""

    def answer(self, message: SpeculateRequest) -> SpeculateResponse:
        """What a speculator answers in a Speculate stream. May raise anything."""

    def restart(self) -> None:
        """Forget everything that was opened."""


class LocalSpeculator:
    """A `DraftSource` that drafts when it is waited for.

    Raises:
        ModelMismatch: a small model does not speak the LLM's tokens.
    """

    elsewhere = False

    def __init__(self, hosted: Answers, llm: ModelFacts, metrics: VerifierMetrics) -> None:
        for facts in hosted.facts:
            facts.check_drafts_for(llm)
        self.names: Sequence[str] = [facts.model for facts in hosted.facts]
        self._hosted = hosted
        self._vocab_size = llm.vocab_size
        self._metrics = metrics
        self._dialogue = DraftDialogue(llm.vocab_size)
        self._order = SpeculateRequest()
        self._rests_until = 0.0  # monotonic time
        metrics.speculator_up.labels(NAME).set(1)

    @property
    def models(self) -> int:
        return 0 if self._resting else max(1, len(self.names))

    @property
    def _resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def open(self, sequences: Sequence[RunningSequence]) -> None:
        if not self._resting:
            with self._surviving():
                self._tell(self._dialogue.opening(sequences))

    def send(self, step: int, orders: Sequence[DraftOrder]) -> bool:
        if self._resting:
            return False
        self._order = self._dialogue.order(step, orders)
        return True

    def receive(self, step: int, deadline: float) -> Mapping[int, list[TokenTree]]:
        """Drafts now, however long it takes: nobody else could go on meanwhile."""
        with self._surviving():
            response = self._hosted.answer(self._order)
            self._metrics.answer_seconds.labels(NAME).observe(response.work_seconds)
            return self._dialogue.drafts(response)
        return {}

    def forget(self, sequence: RunningSequence) -> None:
        self._dialogue.forget(sequence)

    def flush(self) -> None:
        with self._surviving():
            self._tell(self._dialogue.endings())

    def _tell(self, message: SpeculateRequest | None) -> None:
        if message is not None:
            self._hosted.answer(message)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Whatever a draft meets inside, the LLM goes on without it, and what was opened is opened again later."""
        try:
            yield
        except Exception:
            log.exception("drafting failed; decoding goes on without it", extra={"for_s": REST_S})
            self._metrics.speculator_failures.labels(NAME, "failed").inc()
            self._rests_until = time.monotonic() + REST_S
            self._dialogue = DraftDialogue(self._vocab_size)
            self._hosted.restart()
