"""`specserve complete` against a server that answers as told: what the real one answers is tested in test_main."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator

import pytest

from services.launcher.complete import CompletionOptions, Cost, complete

Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    stops: list[Callable[[], None]] = []

    def start(status: int, answer: str) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stops.extend([server.server_close, thread.join, server.shutdown])
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    while stops:
        stops.pop()()


def options(url: str) -> CompletionOptions:
    return CompletionOptions(url, model="m", max_tokens=4, temperature=0.0, seed=None, timeout_s=5.0)


@pytest.mark.parametrize(
    ("status", "answer", "shown", "message"),
    [
        (429, '{"error": {"message": "the queue is full"}}', "", "429: the queue is full"),
        (502, "<html>", "", "502: <html>"),
        (200, 'data: {"choices": [{"text": "once"}]}\n\n', "once", "ended the stream before its end"),
        (
            200,
            'data: {"choices": [{"text": "once"}]}\n\ndata: {"error": {"message": "the verifier is gone"}}\n\n',
            "once",
            "the verifier is gone",
        ),
    ],
)
def test_failures_are_told(
    serve: Serve, capsys: pytest.CaptureFixture[str], status: int, answer: str, shown: str, message: str
) -> None:
    assert complete("hello", options(serve(status, answer))) == 1
    captured = capsys.readouterr()
    assert captured.out == shown
    assert message in captured.err


def test_the_cost_names_what_is_known() -> None:
    assert Cost(60, 12, 0.1, 0.6).summary() == (
        "60 tokens, 12 LLM steps (5.00 tokens/step), first text after 100 ms, 10.0 ms/token in all"
    )
    assert "steps" not in Cost(1, 0, 0.1, 0.1).summary()
    assert "ms/token" not in Cost(0, 0, 0.0, 0.1).summary()
