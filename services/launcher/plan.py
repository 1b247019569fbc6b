"""What `specserve up` starts: the services, their addresses and their command lines."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from services.common.model_files import resolve_model
from services.common.settings import SettingsError, given_settings, to_flags
from services.launcher.readiness import grpc_alive_probe, grpc_probe, http_probe, redis_probe
from services.launcher.redis_server import find_redis_server, redis_command, redis_url
from services.launcher.settings import SEPARATOR, UpSettings
from services.launcher.supervisor import Service

LOOPBACK = "127.0.0.1"
# Below the ports of outgoing connections: while a service is restarted, a client that looks for it could otherwise be
# given the very port that it looks for, and keep it.
FREE_CHOICES = range(20_000, 30_000)
FREE_ATTEMPTS = 20
# Settings that `up` hands on to a service, unless the service's own table or environment gives them.
SHARED = ("log_level", "log_format")
# The services of one machine meet on loopback addresses, where nobody else listens: no certificates.
ON_LOOPBACK = {"insecure": True, "tls_cert": None, "tls_key": None, "tls_ca": None}
SHARED_WITH_VERIFIER = ("threads", "tensor_parallel", "pipeline_parallel")
# What only the first of several speculators does, whatever their common table says.
FIRST_SPECULATOR_ONLY = {"prompt_lookup": False, "suffix_index_tokens": 0, "metrics_port": 0}


@dataclass(frozen=True)
class Plan:
    """services: what works without the others first. url: of the HTTP API."""

    services: tuple[Service, ...]
    url: str


class Planner:
    """Decides addresses; `folder` is the run's own folder."""

    def __init__(
        self, settings: UpSettings, config: Path | None, folder: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self._settings = settings
        self._config = config
        self._folder = folder
        self._environ = environ
        # Of every service; what has not ended by the drain timeout of `up` is killed.
        self._common = {**ON_LOOPBACK, "drain_timeout_s": settings.drain_timeout_s}

    def plan(self) -> Plan:
        """
        Raises:
            SettingsError: a port is taken, or a service's own settings give what `up` decides.
            ModelFilesError: a model is not there.
            NoRedisServer: none was given and there is none to start.
        """
        settings = self._settings
        for model in (settings.llm, *settings.drafting):
            resolve_model(model)
        redis = settings.redis_url or redis_url(self._folder)
        with ExitStack() as held:
            verifier = f"{LOOPBACK}:{_hold_port(held, LOOPBACK, settings.verifier_port, '--verifier-port')}"
            wanted = [settings.speculator_port, *(0 for _ in settings.speculators[1:])][: len(settings.speculators)]
            speculators = [f"{LOOPBACK}:{_hold_port(held, LOOPBACK, port, '--speculator-port')}" for port in wanted]
            port = _hold_port(held, settings.host, settings.port, "--port")
        services = [self._redis(redis)] if settings.redis_url is None else []
        services += [self._speculator(index, address) for index, address in enumerate(speculators)]
        services.append(self._verifier(verifier, tuple(speculators)))
        services.append(self._gateway(port, verifier, redis))
        return Plan(tuple(services), f"http://{_reachable(settings.host)}:{port}")

    def _redis(self, url: str) -> Service:
        command = tuple(redis_command(find_redis_server(), self._folder))
        return Service("redis", command, redis_probe(url), redis_probe(url), silent=True)

    def _speculator(self, index: int, address: str) -> Service:
        decided = {"host": LOOPBACK, "port": _port_of(address), "ssm": self._settings.speculators[index]} | self._common
        command = self._module("speculator") + self._flags("speculator", decided, SHARED)
        if index:
            command += tuple(to_flags(FIRST_SPECULATOR_ONLY))
        name = "speculator" if len(self._settings.speculators) == 1 else f"speculator-{index + 1}"
        return Service(name, command, grpc_probe(address), grpc_alive_probe(address), expendable=True)

    def _verifier(self, address: str, speculators: tuple[str, ...]) -> Service:
        decided = {
            "host": LOOPBACK,
            "port": _port_of(address),
            "llm": self._settings.llm,
            "speculator": speculators,
        } | self._common
        flags = self._flags("verifier", decided, (*SHARED, *SHARED_WITH_VERIFIER))
        command = self._module("verifier") + flags
        if self._settings.one_process:
            small: dict[str, object] = {"ssm": self._settings.drafting, **ON_LOOPBACK}
            drafting = self._flags("speculator", small, ())
            command = (*self._module("launcher.one_process"), *flags, SEPARATOR, *drafting)
        return Service("verifier", command, grpc_probe(address), grpc_alive_probe(address))

    def _gateway(self, port: int, verifier: str, redis: str) -> Service:
        settings = self._settings
        decided = {
            "host": settings.host,
            "port": port,
            "model": settings.llm,
            "verifier": verifier,
            "redis_url": redis,
            "https_cert": None,
            "https_key": None,
        } | self._common
        url = f"http://{_reachable(settings.host)}:{port}"
        command = self._module("gateway") + self._flags("gateway", decided, SHARED)
        return Service("gateway", command, http_probe(f"{url}/ready"), http_probe(f"{url}/health"), yields=True)

    def _module(self, name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"services.{name}")

    def _flags(self, section: str, decided: Mapping[str, object], shared: tuple[str, ...]) -> tuple[str, ...]:
        given = given_settings(section, self._config, self._environ)
        if clash := sorted(given & decided.keys()):
            raise SettingsError(
                f"{clash[0]} of [{section}] is decided by `specserve up`; remove it from the --config file and the "
                "environment, and use the settings of [up]"
            )
        values = dict(decided) | {name: getattr(self._settings, name) for name in shared if name not in given}
        config = [] if self._config is None else ["--config", str(self._config)]
        return (*to_flags(values), *config)


def _hold_port(held: ExitStack, host: str, wanted: int, flag: str) -> int:
    """`wanted`, or a free one for 0; nobody else gets it until `held` closes and its service binds it."""
    candidates = random.sample(FREE_CHOICES, FREE_ATTEMPTS) if wanted == 0 else [wanted]
    reason: str | None = None
    for port in candidates:
        listener = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1)  # only a port that is listened on is refused to a second socket with SO_REUSEADDR
        except OSError as error:
            reason = error.strerror
        else:
            return port
    raise SettingsError(f"{flag}: cannot listen on {host}:{wanted}: {reason}; choose another")


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _reachable(host: str) -> str:
    """The address that reaches a server on this machine that listens on `host`."""
    return {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
