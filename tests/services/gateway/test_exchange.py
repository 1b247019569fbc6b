"""How requests end that do not end in text."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import httpx
import openai
import pytest

from services.verifier.request import EngineStopped, InvalidRequest, QueueFull
from tests.services.gateway.conftest import RunningGateway, counter, wait_until

BODY = {"model": "scripted", "prompt": "x", "max_tokens": 200}


def long_reply(gateway: RunningGateway) -> None:
    """200 tokens in 10 s."""
    gateway.script.reply = lambda request: [300] * 200
    gateway.script.delay_s = 0.05


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_cancels_its_generations(gateway: RunningGateway, stream: bool) -> None:
    long_reply(gateway)
    with httpx.Client(base_url=gateway.url) as client:
        body = BODY | {"stream": stream, "n": 2}
        if stream:
            with client.stream("POST", "/v1/completions", json=body, timeout=5) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
    assert len(gateway.script.requests) == 2
    for request in gateway.script.requests:
        assert gateway.script.cancelled[request.request_id].wait(2)
    wait_until(lambda: counter(gateway, "specserve_gateway_requests_total", status="499") == 1)
    assert counter(gateway, "specserve_gateway_open_requests") == 0


def test_a_client_that_leaves_before_its_body_is_complete_is_forgotten(gateway: RunningGateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        wait_until(lambda: counter(gateway, "specserve_gateway_open_requests") == 1)
    wait_until(lambda: counter(gateway, "specserve_gateway_requests_total", status="499") == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("retry_after_ms", "seconds"), [(250, "1"), (2500, "3")])
def test_a_full_queue(gateway: RunningGateway, stream: bool, retry_after_ms: int, seconds: str) -> None:
    gateway.script.refuse = lambda request: QueueFull(8, retry_after_ms)
    with pytest.raises(openai.RateLimitError, match="8 requests are waiting") as caught:
        gateway.client.completions.create(model="scripted", prompt="x", stream=stream)
    assert caught.value.response.headers["retry-after"] == seconds
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "queue_full")


@pytest.mark.parametrize(
    ("refusal", "status", "name"),
    [
        (EngineStopped, 503, "verifier_unavailable"),
        (InvalidRequest, 400, "refused"),
        (ZeroDivisionError, 502, "verifier_failed"),
    ],
)
def test_what_the_verifier_refuses_is_not_retried(
    gateway: RunningGateway, refusal: type[Exception], status: int, name: str
) -> None:
    gateway.script.refuse = lambda request: refusal("scripted refusal")
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.client.completions.create(model="scripted", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (status, name)
    assert len(gateway.script.requests) == 1


def test_one_refused_choice_cancels_the_others(gateway: RunningGateway) -> None:
    long_reply(gateway)
    gateway.script.refuse = lambda request: QueueFull(8, retry_after_ms=1000) if request == 2 else None
    with pytest.raises(openai.RateLimitError):
        gateway.client.completions.create(model="scripted", prompt="x", n=3, max_tokens=200, stream=True)
    for request in gateway.script.requests[:2]:
        assert gateway.script.cancelled[request.request_id].wait(2)


def test_no_verifier(start_gateway: Callable[..., RunningGateway], free_port: Callable[[], int]) -> None:
    gateway = start_gateway(verifier=f"127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.client.completions.create(model="scripted", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "verifier_unavailable")
    assert "retry-after" in caught.value.response.headers
    assert time.monotonic() - began < 10


def test_no_redis(start_gateway: Callable[..., RunningGateway], free_port: Callable[[], int]) -> None:
    gateway = start_gateway(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.client.completions.create(model="scripted", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "records_unavailable")
    assert gateway.script.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(start_gateway: Callable[..., RunningGateway], stream: bool) -> None:
    gateway = start_gateway(request_timeout_s=0.5)
    long_reply(gateway)
    if stream:
        response = httpx.post(f"{gateway.url}/v1/completions", json=BODY | {"stream": True}, timeout=5)
        assert response.status_code == 200
        *pieces, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert pieces
        assert json.loads(last)["error"]["code"] == "timeout"
    else:
        with pytest.raises(openai.APIStatusError) as caught:
            gateway.client.completions.create(model="scripted", prompt="x", max_tokens=200)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    [request] = gateway.script.requests
    assert gateway.script.cancelled[request.request_id].wait(2)


def test_a_body_that_never_ends_has_the_same_time(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway(request_timeout_s=0.5)
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 504 ")
        wait_until(lambda: counter(gateway, "specserve_gateway_open_requests") == 0)


def test_the_sdk_raises_an_error_in_mid_stream(gateway: RunningGateway) -> None:
    gateway.script.reply = lambda request: [300] * 5
    gateway.script.failure = RuntimeError("scripted failure")
    events = iter(gateway.client.completions.create(model="scripted", prompt="x", stream=True, max_tokens=9))
    assert next(events).choices[0].text
    with pytest.raises(openai.APIError, match="scripted failure"):
        list(events)


def test_an_answer_that_breaks_the_protocol(gateway: RunningGateway) -> None:
    gateway.script.reply = lambda request: [300] * 5
    gateway.script.broken = True
    with pytest.raises(openai.APIStatusError, match="2 log-probabilities for 1 tokens") as caught:
        gateway.client.completions.create(model="scripted", prompt="x")
    assert caught.value.status_code == 502


def test_events_as_openai_sends_them(gateway: RunningGateway) -> None:
    gateway.says("hi")
    response = httpx.post(f"{gateway.url}/v1/completions", json=BODY | {"stream": True}, timeout=5)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        [choice] = chunk["choices"]
        assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
