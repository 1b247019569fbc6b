"""gRPC's core is told what the services prefer before it is loaded, and understands it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TOLD = "-event_engine_client,-event_engine_listener"
# A server and a channel make the core read its experiments.
_USES_GRPC = """
import os
import services.{service}.server
import grpc
server = grpc.server(None)
with grpc.insecure_channel(f"127.0.0.1:{{server.add_insecure_port('127.0.0.1:0')}}"):
    print(os.environ["GRPC_EXPERIMENTS"])
"""
_WATCHES_IMPORTS = """
import builtins, os
first = []
original = builtins.__import__
def watching(name, *args, **kwargs):
    if name == "grpc" and not first:
        first.append(os.environ.get("GRPC_EXPERIMENTS"))
    return original(name, *args, **kwargs)
builtins.__import__ = watching
import services.verifier.__main__, services.verifier.server
import services.gateway.server, services.speculator.server, services.launcher.main
print(first[0])
"""


def _run(program: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("service", ["gateway", "speculator", "verifier"])
def test_the_core_knows_what_a_service_tells_it(service: str) -> None:
    ran = _run(_USES_GRPC.format(service=service), {})
    assert ran.stdout.strip() == TOLD
    assert "nknown experiment" not in ran.stderr


def test_what_is_not_known_is_said() -> None:
    ran = _run(_USES_GRPC.format(service="verifier"), {"GRPC_EXPERIMENTS": "-no_such_experiment"})
    assert ran.stdout.strip() == "-no_such_experiment"  # an operator's own setting stays
    assert "nknown experiment" in ran.stderr


def test_nothing_loads_the_core_before_it_is_told() -> None:
    assert _run(_WATCHES_IMPORTS, {}).stdout.strip() == TOLD
