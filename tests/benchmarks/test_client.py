"""The HTTP client against a real server on loopback: what it takes from a stream, and which streams it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.client import CompletionClient, RequestFailed

Serve = Callable[[int, bytes], str]


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], "usage": None}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 5, "llm_steps": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that gives every POST this status and body; returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"data": [{"id": "tiny"}]}')

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_stream_becomes_an_answer(serve: Serve) -> None:
    url = serve(200, event("one ") + event("two") + USAGE + DONE)
    client = CompletionClient.connect(url)
    assert client.model == "tiny"
    answer = client.complete("a prompt", 5)
    assert (answer.text, answer.tokens, answer.events, answer.llm_steps) == ("one two", 5, 2, 2)
    assert 0 < answer.first_token_s < answer.total_s


@pytest.mark.parametrize(
    ("last", "steps"),
    [
        # llama.cpp tells its drafts, and nothing of them without a drafting model; vLLM sends an event for every step.
        ({"timings": {"predicted_n": 5, "draft_n": 4, "draft_n_accepted": 3}}, 2),
        ({"timings": {"predicted_n": 5}}, 5),
        ({}, 3),
    ],
)
def test_the_steps_of_peers_come_from_what_they_tell(serve: Serve, last: dict[str, object], steps: int) -> None:
    end = b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 5}} | last).encode() + b"\n\n"
    stream = CompletionClient(serve(200, event("one ") + event("") + event("two") + end + DONE), "m").stream([5, 6], 5)
    assert stream.answer().llm_steps == steps
    assert stream.token_times == [stream.times[0], stream.times[2]]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (429, b'{"error": {"message": "full"}}', "429.*full"),
        (200, event("one "), "before its end"),
        (200, DONE, "without an event"),
        (200, event("one ") + b'data: {"error": {"message": "the verifier is lost"}}\n\n' + DONE, "verifier is lost"),
    ],
)
def test_a_refused_or_broken_stream_is_an_error(serve: Serve, status: int, body: bytes, message: str) -> None:
    with pytest.raises(RequestFailed, match=message):
        CompletionClient(serve(status, body), "m").complete("a prompt", 5)


def test_an_address_where_nobody_listens_is_an_error(free_port: Callable[[], int]) -> None:
    with pytest.raises(RequestFailed, match="ConnectionRefusedError"):
        CompletionClient.connect(f"http://127.0.0.1:{free_port()}")
