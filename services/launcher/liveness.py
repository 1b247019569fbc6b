"""Notices that a service runs but does not answer."""

from __future__ import annotations

import asyncio
import time

from services.launcher.limits import Limits
from services.launcher.readiness import Probe


async def hang(alive: Probe, limits: Limits) -> float:
    """Returns once the service is taken to hang: the seconds since the first question that it did not answer."""
    while True:
        await asyncio.sleep(limits.alive_pause_s)
        asked = time.monotonic()
        for _ in range(limits.alive_attempts):
            if await _answers(alive, limits.alive_timeout_s):
                break
        else:
            return time.monotonic() - asked


async def _answers(alive: Probe, timeout_s: float) -> bool:
    """False after timeout_s and not before, so that a connection which is refused at once is no shorter silence."""
    deadline = time.monotonic() + timeout_s
    if await alive(timeout_s) is None:
        return True
    await asyncio.sleep(max(deadline - time.monotonic(), 0.0))
    return False
