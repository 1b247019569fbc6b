"""Starts services, restarts those that die or hang, stops all of them one after the other."""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.launcher.limits import Limits
from services.launcher.liveness import hang
from services.launcher.processes import Child, Watchdog
from services.launcher.readiness import Probe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """A program to keep running.

    probe: tells when it is usable.
    alive: tells whether it still answers, also while it drains or another service is away; without, only its death
        is noticed.
    silent: what it writes is shown only when it fails.
    yields: a message that reaches it interrupts nobody who computes (SCHED_BATCH; on Linux).
    expendable: the others work without it, so it is restarted for ever; any other service may die
        Limits.restarts times within Limits.restart_window_s before everything is stopped.
    """

    name: str
    command: tuple[str, ...]
    probe: Probe
    alive: Probe | None = None
    expendable: bool = False
    silent: bool = False
    yields: bool = False


class ServiceFailed(Exception):
    """A service that did not start or cannot be kept running.

    tail: what it wrote last.
    """

    def __init__(self, name: str, reason: str, tail: Sequence[str]) -> None:
        super().__init__(f"{name} {reason}")
        self.name = name
        self.tail = list(tail)


class Progress:
    """What the operator is told; the base class tells nothing."""

    def waiting(self, name: str, missing: str) -> None:
        """A service runs but is not usable yet."""

    def ready(self, name: str, seconds: float) -> None:
        """A service became usable this long after its start."""

    def line(self, text: str) -> None:
        """A service wrote a line."""


class Supervisor:
    """Knows processes and probes, nothing of what the services do."""

    def __init__(
        self,
        services: Sequence[Service],
        environment: Mapping[str, str],
        keeper: Watchdog,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._services = services
        self._environment = environment
        self._keeper = keeper
        self._limits = limits
        self._progress = progress
        self._children: dict[str, Child] = {}

    async def start(self) -> None:
        """Starts all services at once and waits until all are usable.

        Raises:
            ServiceFailed: one ended or did not become usable in time; the others keep running until stop().
        """
        try:
            async with asyncio.TaskGroup() as group:
                for service in self._services:
                    group.create_task(self._start(service))
        except* ServiceFailed as failures:
            raise failures.exceptions[0] from None

    async def supervise(self) -> None:
        """Restarts what dies, and what no longer answers; runs until it is cancelled.

        Raises:
            ServiceFailed: a service that is not expendable died too often.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for service in self._services:
                    group.create_task(self._keep(service))
        except* ServiceFailed as failures:
            raise failures.exceptions[0] from None

    async def stop(self) -> None:
        """Drains and ends the services one after the other, the last of the list first."""
        for service in reversed(self._services):
            child = self._children.get(service.name)
            if child is not None and child.running and not await child.stop(self._limits.stop_timeout_s):
                log.warning("%s did not stop in time and was killed", service.name)

    async def kill(self) -> None:
        """Ends everything at once."""
        await asyncio.gather(*(child.kill() for child in self._children.values()))

    async def _start(self, service: Service) -> None:
        started = time.monotonic()
        child = await self._spawn(service)
        missing: str | None = "is starting"
        while child.running and time.monotonic() - started < self._limits.start_timeout_s:
            if (missing := await service.probe()) is None:
                self._progress.ready(service.name, time.monotonic() - started)
                return
            self._progress.waiting(service.name, missing)
            await asyncio.sleep(self._limits.poll_s)
        if child.running:
            await child.kill()
            reason = f"was not ready within {self._limits.start_timeout_s:g} s ({missing})"
        else:
            code = await child.wait()
            reason = f"ended at its start with {_describe(code)}" + (f": {child.tail[-1]}" if child.tail else "")
        raise ServiceFailed(service.name, reason, child.tail)

    async def _spawn(self, service: Service) -> Child:
        show = _ignore if service.silent else self._progress.line
        spawning = asyncio.ensure_future(
            Child.start(service.name, service.command, self._environment, self._keeper, show, service.yields)
        )
        try:
            child = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # Also a process whose start was interrupted must be known to stop().
            self._children[service.name] = await spawning
            raise
        self._children[service.name] = child
        return child

    async def _keep(self, service: Service) -> None:
        deaths: collections.deque[float] = collections.deque()
        while True:
            child = self._children[service.name]
            code = await self._end_of(service, child)
            delay = self._count_death(service, child, code, deaths)
            log.error("%s ended with %s; it is restarted", service.name, _describe(code), extra={"delay_s": delay})
            await asyncio.sleep(delay)
            try:
                await self._start(service)
            except ServiceFailed as failure:
                log.error("%s", failure)  # its death is counted by the next turn

    async def _end_of(self, service: Service, child: Child) -> int:
        """The exit code of the service, which is killed when it hangs."""
        if service.alive is None:
            return await child.wait()
        ended = asyncio.create_task(child.wait())
        hung = asyncio.create_task(hang(service.alive, self._limits))
        try:
            await asyncio.wait([ended, hung], return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                log.error("%s runs but did not answer for %.1f s; it is killed", service.name, hung.result())
                await child.kill()
            return await ended
        finally:
            ended.cancel()
            hung.cancel()

    def _count_death(self, service: Service, child: Child, code: int, deaths: collections.deque[float]) -> float:
        """How long the restart waits; ServiceFailed when there were too many. deaths: those within the window."""
        now = time.monotonic()
        deaths.append(now)
        while deaths[0] < now - self._limits.restart_window_s:
            deaths.popleft()
        if len(deaths) > self._limits.restarts and not service.expendable:
            reason = f"died {len(deaths)} times within {self._limits.restart_window_s:g} s"
            raise ServiceFailed(service.name, f"{reason}, last with {_describe(code)}", child.tail)
        backoff: float = self._limits.backoff_s * 2 ** (len(deaths) - 1)
        return min(backoff, self._limits.backoff_limit_s)


def _ignore(line: str) -> None:
    pass


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
