from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Callable, Iterator

import pytest

from services.launcher.readiness import grpc_probe, http_probe, redis_probe


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
