from __future__ import annotations

import asyncio
import http.server
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry

from services.common.grpc_setup import Endpoint, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle
from services.common.tls import INSECURE
from services.launcher.readiness import grpc_alive_probe, grpc_probe, http_probe, redis_probe


@pytest.fixture
def http_server() -> Iterator[http.server.HTTPServer]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"" if self.path == "/ready" else b'{"missing": "verifier"}'
            self.send_response(503 if body else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_http(http_server: http.server.HTTPServer, free_port: Callable[[], int]) -> None:
    url = f"http://127.0.0.1:{http_server.server_port}"
    assert asyncio.run(http_probe(f"{url}/ready")()) is None
    assert "503" in str(asyncio.run(http_probe(f"{url}/other")()))
    assert "verifier" in str(asyncio.run(http_probe(f"{url}/other")()))
    assert "ConnectError" in str(asyncio.run(http_probe(f"http://127.0.0.1:{free_port()}/ready")()))


def test_redis(redis_url: str) -> None:
    assert asyncio.run(redis_probe(redis_url)()) is None
    assert "nowhere.sock" in str(asyncio.run(redis_probe("unix:///nowhere.sock")()))


def test_grpc(free_port: Callable[[], int]) -> None:
    assert "is not serving yet" in str(asyncio.run(grpc_probe(f"127.0.0.1:{free_port()}")()))


def test_one_that_drains_is_alive_but_not_ready(free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{(port := free_port())}"
    ready, alive = grpc_probe(address), grpc_alive_probe(address)

    async def drain() -> None:
        lifecycle = Lifecycle(CollectorRegistry())
        async with serving_grpc(aio_server(lifecycle), lifecycle, Endpoint("127.0.0.1", port), INSECURE, []):
            assert (await ready(), await alive()) == (None, None)
            await lifecycle.drain(1.0)
            assert (await ready(), await alive()) == (f"{address} is not serving yet", None)

    asyncio.run(drain())


def test_only_the_whole_timeout_without_an_answer_counts_as_none(free_port: Callable[[], int]) -> None:
    """A process whose machine is busy may take long to accept a connection."""
    address = f"127.0.0.1:{free_port()}"
    asked = time.monotonic()
    assert asyncio.run(grpc_alive_probe(address)(0.5)) == f"{address} does not answer"
    assert time.monotonic() - asked >= 0.45
