"""Starts services as real processes, the way `specserve up` does, and stops them again."""

from __future__ import annotations

import os
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from services.common.setting_values import to_text
from services.common.settings import ENVIRONMENT_PREFIX, to_flags, variable
from services.launcher.environment import child_environment
from services.launcher.limits import Limits
from services.launcher.plan import FREE_ATTEMPTS, FREE_CHOICES, LOOPBACK, Planner
from services.launcher.processes import Watchdog
from services.launcher.readiness import grpc_probe
from services.launcher.settings import UpSettings
from services.launcher.supervisor import Progress, Service, Supervisor

ServiceOptions = Mapping[str, Mapping[str, object]]
"""Settings by section: {"verifier": {"draft_nodes": 4}}."""

# Nothing is open when a stack is stopped.
DRAIN_S = 5.0


@dataclass(frozen=True)
class Stack:
    """Addresses of a running stack: the gateway's URL, HOST:PORT of the verifier."""

    url: str
    verifier: str


@asynccontextmanager
async def running_stack(
    up: UpSettings, options: ServiceOptions, on_line: Callable[[str], None]
) -> AsyncIterator[Stack]:
    """Redis, verifier with speculator, and gateway, ready to be asked; stopped when the context ends.

    up: its ports are ignored, free ones are taken. options: for the services. on_line: gets their log lines.
    The environment's own settings of the services are left out, so that a run measures what it states.

    Raises:
        SettingsError, ModelFilesError, NoRedisServer: see Planner.plan.
        ServiceFailed: a service did not become ready.
    """
    port = free_port()
    up = replace(up, port=0, verifier_port=port, log_level="warning", drain_timeout_s=DRAIN_S)
    environ = _clean_environment() | {
        variable(section, name): _text(value) for section, values in options.items() for name, value in values.items()
    }
    with tempfile.TemporaryDirectory(prefix="specserve-", ignore_cleanup_errors=True) as folder:
        plan = Planner(up, None, Path(folder), environ).plan()
        async with running_services(plan.services, Path(folder), on_line, environ):
            yield Stack(plan.url, f"{LOOPBACK}:{port}")


@asynccontextmanager
async def running_service(
    section: str, settings: Mapping[str, object], on_line: Callable[[str], None]
) -> AsyncIterator[str]:
    """One gRPC service alone; gives its address.

    Raises:
        ServiceFailed: it did not become ready.
    """
    port = free_port()
    address = f"{LOOPBACK}:{port}"
    decided = {"host": LOOPBACK, "port": port, "insecure": True, "log_level": "warning", "drain_timeout_s": DRAIN_S}
    command = (sys.executable, "-m", f"services.{section}", *to_flags(decided | dict(settings)))
    service = Service(section, command, grpc_probe(address))
    with tempfile.TemporaryDirectory(prefix="specserve-", ignore_cleanup_errors=True) as folder:
        async with running_services([service], Path(folder), on_line):
            yield address


def free_port() -> int:
    """A loopback port that nobody listens on, out of those that the launcher chooses from.

    Raises:
        OSError: none of some tries was free.
    """
    for port in random.sample(FREE_CHOICES, FREE_ATTEMPTS):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise OSError(f"{FREE_ATTEMPTS} ports of {FREE_CHOICES} are all taken; end what listens there")


@asynccontextmanager
async def running_services(
    services: Sequence[Service], folder: Path, on_line: Callable[[str], None], environ: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """These services, ready to be asked. folder: the run's own. environ: ours without settings of the services.

    Raises:
        ServiceFailed: one did not become ready.
    """
    limits = Limits(stop_timeout_s=DRAIN_S * 2)
    inherited = _clean_environment() if environ is None else environ
    async with Watchdog(folder) as keeper:
        supervisor = Supervisor(services, child_environment(inherited), keeper, limits, _Lines(on_line))
        try:
            await supervisor.start()
            yield
        finally:
            await supervisor.stop()


class _Lines(Progress):
    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line

    def line(self, text: str) -> None:
        self._on_line(text)


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def _text(value: object) -> str:
    return ",".join(map(to_text, value)) if isinstance(value, tuple) else to_text(value)
