"""Several streams at once: figures from times that can be checked by hand, and from a real server."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.client import CompletionClient, Stream
from benchmarks.load import REQUESTS_PER_STREAM, LoadSample, measure_load, rate_of_all, summarize_load


def test_rows_are_medians_of_rounds_and_percentiles_of_all_answers() -> None:
    samples = [
        LoadSample("a", 8, turn, rate, [10.0, 30.0], [1.0, 2.0, 3.0]) for turn, rate in enumerate((50.0, 200.0, 100.0))
    ]
    other = LoadSample("b", 8, 0, 50.0, [5.0], [])
    (row, second) = summarize_load([*samples, other])
    assert (row.configuration, row.streams, row.tokens_per_s) == ("a", 8, 100)
    assert (row.first_token_p50, row.gap_p50) == (20, 2)
    assert row.first_token_p99 == pytest.approx(30)
    assert (second.tokens_per_s, second.gap_p50) == (50, 0)


def test_rows_are_ordered_by_streams() -> None:
    samples = [LoadSample(name, streams, 0, 1.0, [1.0], [1.0]) for streams in (32, 8) for name in "ab"]
    assert [(row.streams, row.configuration) for row in summarize_load(samples)] == [
        *((8, "a"), (8, "b"), (32, "a"), (32, "b"))
    ]


def answer(started: float, tokens: int, times: list[float]) -> Stream:
    """An answer with an event at each of the times, and its end 0.5 s behind the last of them."""
    events: list[dict[str, Any]] = [{"choices": [{"text": "word"}], "usage": None} for _ in times]
    end = times[-1] + 0.5
    last: dict[str, Any] = {"choices": [], "usage": {"completion_tokens": tokens, "llm_steps": len(times)}}
    return Stream(started, [*times, end], [*events, last], end)


def test_the_rate_is_that_while_all_streams_have_a_request_open() -> None:
    """Two clients: one has nothing left to ask at 8.5 s, the other goes on alone; the third answer is half there."""
    answers = [answer(100.0, 6, [1.0, 2.0, 3.0]), answer(100.0, 10, [4.0, 8.0]), answer(103.5, 8, [2.0, 4.0, 6.0, 8.0])]
    assert rate_of_all(answers) == pytest.approx((6 + 10 + 4) / 8.5)


def test_the_rate_of_one_stream_is_that_of_all_its_answers() -> None:
    assert rate_of_all([answer(5.0, 4, [1.0, 1.5]), answer(7.0, 6, [0.5, 1.5])]) == pytest.approx(10 / 4)


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
            with lock:  # before the last words: their reader may send the next request at once
                open_now -= 1
            self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")

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
    assert 0 < sample.tokens_per_s < 3 * 7 / 0.11
    assert len(sample.first_token_ms) == len(sample.gap_ms) == 3 * REQUESTS_PER_STREAM
    assert min(sample.first_token_ms) >= 100
    assert min(sample.gap_ms) >= 5
