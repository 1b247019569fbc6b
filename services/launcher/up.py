"""`specserve up`: everything on this machine, from the first process to the last."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.status import Status

from services.common.logs import configure_logs
from services.common.model_files import ModelFilesError
from services.common.settings import SettingsError
from services.launcher.environment import child_environment
from services.launcher.limits import Limits
from services.launcher.plan import Planner
from services.launcher.processes import Watchdog
from services.launcher.readiness import PROBE_TIMEOUT_S
from services.launcher.redis_server import NoRedisServer
from services.launcher.settings import UpSettings
from services.launcher.supervisor import Progress, Service, ServiceFailed, Supervisor

log = logging.getLogger(__name__)

# A service gets this long beyond its own drain timeout before it is killed.
STOP_MARGIN_S = 5.0
LIMITS = Limits()

READY = """
SpecServe is ready: {url}/v1  (model {model}; Ctrl-C stops it)

  curl {url}/v1/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 64, "stream": true}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.completions.create(model="{model}", prompt="Once upon a time", max_tokens=64)
  print(answer.choices[0].text)
"""


def up(settings: UpSettings, config: Path | None, limits: Limits = LIMITS) -> int:
    """Runs until a signal; the settings decide how long start and stop may take, `limits` all else.

    Exit codes: 0 after an orderly stop, 1 after a second signal or when a service cannot be run, 2 for bad settings.
    """
    configure_logs("launcher", settings.log_level, settings.log_format)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every probe
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="specserve-", ignore_cleanup_errors=True) as folder:
        try:
            plan = Planner(settings, config, Path(folder)).plan()
        except (SettingsError, ModelFilesError, NoRedisServer) as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return 2
        limits = replace(
            limits,
            start_timeout_s=settings.start_timeout_s,
            stop_timeout_s=settings.drain_timeout_s + STOP_MARGIN_S,
        )
        environment = child_environment(os.environ)
        return asyncio.run(run(plan.services, partial(_greet, plan.url), environment, limits, Path(folder), console))


async def _greet(url: str) -> None:
    """Prints how to call the API, with the name that it gives its model."""
    try:
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
            response = await client.get(f"{url}/v1/models")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            print(f"\nSpecServe is ready: {url}/v1  (requests need an API key; Ctrl-C stops it)", flush=True)
            return
        model = response.raise_for_status().json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise ServiceFailed("gateway", f"is ready but does not tell its model: {error!r}", ()) from None
    print(READY.format(url=url, model=model), flush=True)


async def run(
    services: Sequence[Service],
    on_ready: Callable[[], Awaitable[None]],
    environment: dict[str, str],
    limits: Limits,
    folder: Path,
    console: Console,
) -> int:
    """Starts the services, keeps them running until a signal or a failure, stops them; returns the exit code."""
    signals = Signals()
    progress = ConsoleProgress(console, services)
    async with Watchdog(folder) as keeper:
        supervisor = Supervisor(services, environment, keeper, limits, progress)
        try:
            with progress:
                started = await signals.unless_stopped(supervisor.start())
            if started:
                await on_ready()
                await signals.unless_stopped(supervisor.supervise())
            console.print("Stopping; open requests may finish. Ctrl-C again ends everything at once.")
            code = 0
        except ServiceFailed as failure:
            for line in failure.tail:
                console.print(f"  {failure.name} | {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
            console.print(f"error: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
            code = 1
        finally:
            if not await signals.unless_insisted(supervisor.stop()):
                await supervisor.kill()
                code = 1
    console.print("Stopped.")
    return code


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP asks for an orderly stop, the second for an immediate one."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._insist = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self._insist if self._stop.is_set() else self._stop).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Runs `work`, which the first signal cancels; False when it did."""
        return await _unless(self._stop, work)

    async def unless_insisted(self, work: Coroutine[Any, Any, None]) -> bool:
        """Runs `work`, which the second signal cancels; False when it did."""
        return await _unless(self._insist, work)


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return False
    await task
    return True


class ConsoleProgress(Progress):
    """A line for each service that becomes ready, a moving status for those that are not, and their own lines."""

    def __init__(self, console: Console, services: Sequence[Service]) -> None:
        self._console = console
        self._missing = {service.name: "" for service in services}
        self._status: Status | None = None

    def __enter__(self) -> None:
        self._status = self._console.status("")
        self._status.start()
        self._show()

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def waiting(self, name: str, missing: str) -> None:
        self._missing[name] = missing
        self._show()

    def ready(self, name: str, seconds: float) -> None:
        self._missing.pop(name, None)
        self._console.print(f"{name} is ready after {seconds:.1f} s", highlight=False)
        self._show()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        if self._status is not None:
            self._status.update("Starting " + ", ".join(self._missing))
