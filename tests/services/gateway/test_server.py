"""The gateway as a process: start, drain, what it imports."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from services.gateway import server
from tests.services.gateway.conftest import RunningGateway, wait_until


@contextmanager
def gateway_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.gateway", "--insecure", *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(("drain_timeout_s", "text_is_whole"), [("30", True), ("0.3", False)])
def test_sigterm_drains(
    gateway: RunningGateway,
    byte_level_folder: Path,
    redis_url: str,
    free_port: Callable[[], int],
    drain_timeout_s: str,
    text_is_whole: bool,
) -> None:
    """The process shares the verifier of a gateway in this process."""
    gateway.script.reply = lambda request: [300] * 40
    gateway.script.delay_s = 0.05
    port = free_port()
    arguments = {"model": str(byte_level_folder), "verifier": gateway.verifier, "redis-url": redis_url}
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    with gateway_process(*flags, f"--port={port}", f"--drain-timeout-s={drain_timeout_s}") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url), timeout_s=20)
        body = {"model": "scripted", "prompt": "x", "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            libraries = Path(f"/proc/{process.pid}/maps").read_text()
            assert "grpc" in libraries
            assert "torch" not in libraries
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not answers(url))
            rest = [line for line in lines if line]
        assert process.wait(20) == 0
    if text_is_whole:
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 40
    else:
        assert '"code":"shutting_down"' in rest[-1]
        assert len(rest) < 40


def test_a_draining_gateway_takes_no_new_request(gateway: RunningGateway) -> None:
    gateway.script.reply = lambda request: [300] * 20
    gateway.script.delay_s = 0.05
    body = {"model": "scripted", "prompt": "x", "max_tokens": 20}
    results: list[httpx.Response] = []
    with httpx.Client(base_url=gateway.url, timeout=10) as client:
        first = threading.Thread(target=lambda: results.append(client.post("/v1/completions", json=body)))
        first.start()
        wait_until(lambda: bool(gateway.script.requests))
        gateway.loop.call_soon_threadsafe(gateway.lifecycle.drain_started.set)
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert "gateway" in client.get("/ready").json()["missing"]
        refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        first.join(10)
    assert results[0].status_code == 200


def test_idle_connections_last_longer_than_a_balancer_keeps_them(
    start_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.KEEP_ALIVE_S > 60
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 1)
    host, port = start_gateway().url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: example\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        while connection.recv(2**16):
            pass  # up to the server's end, which comes by its own setting and not by uvicorn's of 5 s


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--model", "BROKEN"], "tokenizer.json"),
        (["--model", "MODEL", "--port", "TAKEN"], "choose another"),
    ],
)
def test_what_stops_the_start_is_one_line(
    gateway: RunningGateway, byte_level_folder: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    names = {"BROKEN": str(tmp_path), "MODEL": str(byte_level_folder), "TAKEN": gateway.url.rsplit(":", 1)[1]}
    command = [sys.executable, "-m", "services.gateway", "--insecure", *(names.get(flag, flag) for flag in flags)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert process.returncode == 1
    assert message in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_torch_is_not_imported() -> None:
    program = """
import sys, importlib, pkgutil, services.gateway
for module in pkgutil.iter_modules(services.gateway.__path__):
    if module.name != "__main__":
        importlib.import_module(f"services.gateway.{module.name}")
print("torch" in sys.modules, "services.gateway.server" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.split() == ["False", "True"]
