"""`specserve up` with example children: argv is a folder and, as JSON, limits and the flags of each child."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from services.common.logs import configure_logs
from services.launcher.limits import Limits
from services.launcher.readiness import http_probe
from services.launcher.supervisor import Service
from services.launcher.up import run
from tests.ports import free_port
from tests.services.launcher import example_child

CHILDREN = ("store", "drafter", "model", "front")


def main() -> int:
    folder, journal = Path(sys.argv[1]), sys.argv[2]
    limits = Limits(**json.loads(sys.argv[3]))
    flags: dict[str, list[str]] = json.loads(sys.argv[4])
    services: list[Service] = []
    for name in CHILDREN:
        port = free_port()
        arguments = (name, str(port), journal, *flags.get(name, []))
        services.append(
            Service(
                name,
                (sys.executable, "-I", "-S", example_child.__file__, *arguments),
                http_probe(f"http://127.0.0.1:{port}/ready"),
                http_probe(f"http://127.0.0.1:{port}/alive"),
                expendable=name == "drafter",
                yields=name == "front",
            )
        )
    configure_logs("launcher", "info", "console")
    return asyncio.run(run(services, greet, dict(os.environ), limits, folder, Console(stderr=True)))


async def greet() -> None:
    print("all are ready", flush=True)


if __name__ == "__main__":
    sys.exit(main())
