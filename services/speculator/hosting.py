"""A speculator inside of the process of the one verifier that it drafts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.drafting import SpeculateRequest, SpeculateResponse
from services.common.model_facts import ModelFacts
from services.speculator.draft_service import DraftService

# A speculator keeps apart what its streams open; here there is one.
_STREAM = 1


@dataclass(frozen=True)
class HostedSpeculator:
    """Answers messages as in a Speculate stream that never ends. facts: of the small models."""

    service: DraftService
    facts: Sequence[ModelFacts]

    def answer(self, message: SpeculateRequest) -> SpeculateResponse:
        """Raises ValueError when the message breaks the protocol. Texts are computed at once: nobody else waits."""
        return self.service.answer(_STREAM, message, at_once=True)

    def restart(self) -> None:
        """Forget every sequence."""
        self.service.end(_STREAM)
