"""What every request of a gateway process uses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.common.lifecycle import Lifecycle
from services.gateway.errors import RETRY_AFTER_S, ApiError
from services.gateway.metrics import GatewayMetrics
from services.gateway.plan import Limits
from services.gateway.records import Records
from services.gateway.replicas import Replicas
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import GatewayTokenizer
from services.gateway.verifier import ResumePolicy


@dataclass(frozen=True)
class Gateway:
    """The parts of a running gateway, and the time limits of its open requests."""

    settings: GatewaySettings
    tokenizer: GatewayTokenizer
    verifiers: Replicas
    records: Records
    metrics: GatewayMetrics
    lifecycle: Lifecycle
    started: int = field(default_factory=lambda: int(time.time()))
    _deadlines: set[asyncio.Timeout] = field(default_factory=set)

    @property
    def limits(self) -> Limits:
        return Limits(self.settings.max_choices, self.settings.max_stop_length)

    @property
    def resume(self) -> ResumePolicy:
        return ResumePolicy(self.settings.resume_timeout_s, self.settings.resume_attempts)

    @asynccontextmanager
    async def time_limit(self, arrived: float) -> AsyncIterator[None]:
        """TimeoutError when a request has taken too long, or when the drain's time is over.

        arrived: when the request came, in time.monotonic().
        """
        async with asyncio.timeout(self.settings.request_timeout_s - (time.monotonic() - arrived)) as deadline:
            self._deadlines.add(deadline)
            try:
                yield
            finally:
                self._deadlines.discard(deadline)

    def end_open_requests(self) -> None:
        """The drain's time is over: every request that is still open ends with an error."""
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(now)

    def time_is_over(self) -> ApiError:
        """Why a time limit ended a request."""
        if self.lifecycle.draining:
            return ApiError(
                503, "the gateway is shutting down; try again", code="shutting_down", retry_after_s=RETRY_AFTER_S
            )
        return ApiError(504, f"the request took longer than {self.settings.request_timeout_s:g} s", code="timeout")
