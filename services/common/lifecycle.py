"""The life of a service process: it serves, drains its open work, ends.

Knows neither gRPC nor HTTP: their servers count their requests as work and listen for the start of the drain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from services.common.metrics import new_registry

log = logging.getLogger(__name__)


class StartupError(Exception):
    """The service cannot start; the message is one line that says what is wrong and what to do."""


class Draining(Exception):
    """New work is refused because the service is stopping."""


class Lifecycle:
    """Belongs to one event loop; only fail() may be called from another thread.

    registry: the Prometheus metrics of this process.
    drain_started: set when the drain begins; what never ends by itself ends on it.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = new_registry() if registry is None else registry
        self.drain_started = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._stop_requested = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._open_work = 0
        self._on_drain: list[Callable[[], None]] = []
        self._failure: BaseException | None = None

    @property
    def draining(self) -> bool:
        return self.drain_started.is_set()

    @property
    def open_work(self) -> int:
        return self._open_work

    @property
    def failure(self) -> BaseException | None:
        """The first error that fail() was told of."""
        return self._failure

    @contextmanager
    def work(self) -> Iterator[None]:
        """One unit of work that the drain waits for.

        Raises:
            Draining: the drain has begun.
        """
        if self.draining:
            raise Draining("the service is shutting down and takes no new work; try again in a moment")
        self._open_work += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open_work -= 1
            if self._open_work == 0:
                self._idle.set()

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Calls back once, on the event loop, when the drain begins."""
        self._on_drain.append(callback)

    def stop(self) -> None:
        """Asks for the drain; wait_stop() returns."""
        self._stop_requested.set()

    def stop_from_signal(self) -> None:
        """stop() for signal handlers and other threads."""
        self._loop.call_soon_threadsafe(self.stop)

    def fail(self, error: BaseException) -> None:
        """Reports that the service cannot go on, from any thread: it drains and its process exits with code 1."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            log.error("service failed", exc_info=error)
        self.stop()

    async def wait_stop(self) -> None:
        await self._stop_requested.wait()

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new work and waits for what is open; False when the timeout came first."""
        self.drain_started.set()
        for callback in self._on_drain:
            callback()
        if self._open_work:
            log.info("draining", extra={"open": self._open_work, "timeout_s": timeout_s})
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.warning("drain timed out; what is open is cancelled", extra={"open": self._open_work})
            return False
        return True
