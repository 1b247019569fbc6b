"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from services.launcher.redis_server import find_redis_server, redis_command
from tests import ports

REDIS_START_TIMEOUT_S = 10.0
HERE = Path(__file__).parent
# Folders whose tests start services and wait for them, and the one whose tests take longest each.
SERVING, LONG = ("services", "e2e", "benchmarks"), "training"


def folder_of(item: pytest.Item) -> str:
    """That of this one which the test lies in."""
    return item.path.relative_to(HERE).parts[0]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes one has all tests that serve, since two stacks at once would keep each other waiting; the
    others take the rest by file, those first at which nobody should be left alone in the end.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group("serving" if folder_of(item) in SERVING else str(item.path)))
    items.sort(key=lambda item: (folder_of(item) not in SERVING) + (folder_of(item) not in (*SERVING, LONG)))


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives a loopback port that nobody listens on."""
    return ports.free_port


@pytest.fixture(scope="session")
def _redis_process() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="redis-"))  # pytest's own folders are too long for the path of a socket
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(redis_command(find_redis_server(), folder), stdout=log, stderr=log)
    url = f"unix://{folder / 'redis.sock'}"
    try:
        deadline = time.monotonic() + REDIS_START_TIMEOUT_S
        while not (folder / "redis.sock").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "redis-server did not open its socket"
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait(REDIS_START_TIMEOUT_S)
        shutil.rmtree(folder)


@pytest.fixture
def redis_url(_redis_process: str) -> Iterator[str]:
    """URL of a real Redis server that is empty at the start of the test."""
    with redis.Redis.from_url(_redis_process) as client:
        client.flushall()
        yield _redis_process
