"""Several streams at once: figures from times that can be checked by hand, and from a real server."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.client import CompletionClient
from benchmarks.load import REQUESTS_PER_STREAM, LoadSample, measure_load, summarize_load


def test_rows_are_medians_of_rounds_and_percentiles_of_all_answers() -> None:
    samples = [
        LoadSample("a", 8, turn, tokens, 2.0, [10.0, 30.0], [1.0, 2.0, 3.0])
        for turn, tokens in enumerate((100, 400, 200))
    ]
    other = LoadSample("b", 8, 0, 50, 1.0, [5.0], [])
    (row, second) = summarize_load([*samples, other])
    assert (row.configuration, row.streams, row.tokens_per_s) == ("a", 8, 100)
    assert (row.first_token_p50, row.gap_p50) == (20, 2)
    assert row.first_token_p99 == pytest.approx(30)
    assert (second.tokens_per_s, second.gap_p50) == (50, 0)


def test_rows_are_ordered_by_streams() -> None:
    samples = [LoadSample(name, streams, 0, 1, 1.0, [1.0], [1.0]) for streams in (32, 8) for name in "ab"]
    assert [(row.streams, row.configuration) for row in summarize_load(samples)] == [
        *((8, "a"), (8, "b"), (32, "a"), (32, "b"))
    ]


def test_so_many_requests_are_open_at_once() -> None:
    open_now, most, lock = 0, 0, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal open_now, most
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                open_now += 1
                most = max(most, open_now)
            time.sleep(0.1)
            self.send_response(200)
            self.end_headers()
            for text in ("one", " two"):
                self.wfile.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")
                time.sleep(0.01)
            usage = {"completion_tokens": 7, "llm_steps": 2}
            self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
            with lock:
                open_now -= 1

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        client = CompletionClient(f"http://127.0.0.1:{server.server_address[1]}", "m")
        sample = measure_load(client, "a", [[1], [2]], 7, 3, 0)
    finally:
        server.shutdown()
        server.server_close()
    assert most == 3
    assert sample.tokens == 7 * 3 * REQUESTS_PER_STREAM
    assert len(sample.first_token_ms) == len(sample.gap_ms) == 3 * REQUESTS_PER_STREAM
    assert min(sample.first_token_ms) >= 100
    assert min(sample.gap_ms) >= 5
