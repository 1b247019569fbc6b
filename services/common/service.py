"""Runs a service as a process: settings, logs, metrics endpoint, signals, drain, exit code."""

from __future__ import annotations

import enum
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import uvloop

from services.common.command_line import run_command
from services.common.large_pages import use_large_pages
from services.common.lifecycle import Lifecycle, StartupError
from services.common.logs import configure_logs
from services.common.metrics import metrics_endpoint
from services.common.model_files import ModelFilesError
from services.common.settings import ServiceSettings, SettingsError

log = logging.getLogger(__name__)

S = TypeVar("S", bound=ServiceSettings)
Serve = Callable[[S, Lifecycle], AbstractAsyncContextManager[None]]

# New containers at which Python looks for garbage. A step with drafts for many sequences makes thousands and frees them
# at its end: at Python's own 700 they are looked through several times meanwhile.
_GC_OBJECTS = 25_000
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_service(cls: type[S], section: str, serve: Serve[S]) -> NoReturn:
    """The main program of a service; exits the process.

    serve: entered, the service serves; left, it has freed everything. It may raise StartupError on entry.
    Exit codes: 0 after a drain (also one that ran out of time), 1 when the service failed or could not start, 2 for bad
    settings, 128 + n when signal n came before the service served, or came twice.
    """

    def run(settings: S, config: Path | None) -> int:
        configure_logs(section, settings.log_level, settings.log_format)
        return serve_until_signal(section, settings, serve)

    run_command(cls, section, run)


def serve_until_signal(name: str, settings: S, serve: Serve[S]) -> int:
    """Serves until SIGTERM, SIGINT or a failure, then drains; returns the exit code."""
    try:
        # messages cost less on its loop than on that of asyncio
        return uvloop.run(_serve(settings, serve))
    except (StartupError, SettingsError, ModelFilesError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


async def _serve(settings: S, serve: Serve[S]) -> int:
    lifecycle = Lifecycle()
    with ExitStack() as stack:
        serving = stack.enter_context(_signals(lifecycle))
        metrics_port = _start_metrics(stack, lifecycle, settings)
        async with serve(settings, lifecycle):
            gc.collect()
            gc.freeze()  # what was loaded lives as long as the process: no request waits while it is looked through
            gc.set_threshold(_GC_OBJECTS)
            use_large_pages()
            serving()
            log.info("serving", extra={"metrics_port": metrics_port} if metrics_port else None)
            await lifecycle.wait_stop()
            await lifecycle.drain(settings.drain_timeout_s)
        log.info("stopped")
    return 0 if lifecycle.failure is None else 1


def _start_metrics(stack: ExitStack, lifecycle: Lifecycle, settings: ServiceSettings) -> int | None:
    host, port = settings.metrics_host, settings.metrics_port
    try:
        return stack.enter_context(metrics_endpoint(lifecycle.registry, host, port))
    except OSError as error:
        raise StartupError(
            f"--metrics-port: cannot listen on {host}:{port}: {error.strerror}; choose another"
        ) from None


class _Phase(enum.Enum):
    STARTING = enum.auto()
    SERVING = enum.auto()
    STOPPING = enum.auto()


@contextmanager
def _signals(lifecycle: Lifecycle) -> Iterator[Callable[[], None]]:
    """Yields the function to call once the service serves.

    Before, a signal ends the process (also while a model loads and the event loop stands still); after, the first one
    asks for the drain and the second one ends the process at once.
    """
    phase = _Phase.STARTING

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal phase
        if phase is _Phase.STARTING:
            raise SystemExit(128 + number)
        if phase is _Phase.STOPPING:
            os._exit(128 + number)
        phase = _Phase.STOPPING
        lifecycle.stop_from_signal()

    def serving() -> None:
        nonlocal phase
        phase = _Phase.SERVING

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield serving
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
