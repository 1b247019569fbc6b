"""What bad input gets, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from services.gateway.errors import ApiError
from services.gateway.plan import SMALLEST_TOP_P
from services.gateway.schemas import CompletionRequest
from speculation.sampling import SamplingParams
from tests.services.gateway.conftest import RunningGateway

VALID: dict[str, Any] = {"model": "scripted", "prompt": "x"}


@pytest.fixture(scope="module")
def post(start_module_gateway: Callable[..., RunningGateway]) -> Iterator[Callable[..., httpx.Response]]:
    """Posts a body to one gateway that all these tests share."""
    gateway = start_module_gateway(max_body_bytes=20_000, max_choices=8)
    with httpx.Client(base_url=gateway.url, timeout=10) as client:
        yield lambda **options: client.post("/v1/completions", **options)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, checked for OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": }',
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"model": "scripted", "prompt": "x", "temperature": NaN}',
    ],
)
def test_malformed_json(post: Callable[..., httpx.Response], body: bytes) -> None:
    error = error_of(post(content=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("body", [[], 3, "text", True])
def test_a_body_that_is_no_object(post: Callable[..., httpx.Response], body: object) -> None:
    assert "must be a JSON object" in error_of(post(json=body), 400)["message"]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("model", 3, "the name of the served model"),
        ("prompt", 3, "a non-empty string"),
        ("prompt", "", "a non-empty string"),
        ("prompt", [], "a non-empty string"),
        ("prompt", [""], "a non-empty string"),
        ("prompt", [[]], "a non-empty string"),
        ("prompt", [1, "a"], "a non-empty string"),
        ("prompt", [1.5], "a non-empty string"),
        ("prompt", [True], "a non-empty string"),
        ("prompt", {"text": "x"}, "a non-empty string"),
        ("prompt", [100_000], "0..511"),
        ("prompt", [-1], "0..511"),
        ("prompt", [[1], [512]], "0..511"),
        ("max_tokens", "16", "an integer"),
        ("max_tokens", 1.5, "an integer"),
        ("max_tokens", True, "an integer"),
        ("max_tokens", -1, "an integer of at least 0"),
        ("max_tokens", 0, "echo must be true"),
        ("max_tokens", 256, "the context of scripted is 256"),
        ("max_tokens", 10**30, "an integer"),
        ("n", 0, "1..1024"),
        ("n", 9, "8 choices"),
        ("best_of", 2, "equal to n"),
        ("temperature", "hot", "0..2"),
        ("temperature", -0.1, "0..2"),
        ("temperature", 2.1, "0..2"),
        ("top_p", 1.1, "0..1"),
        ("top_k", -1, "at least 0"),
        ("min_p", 2, "0..1"),
        ("speculative", "no", "true or false"),
        ("repetition_penalty", 0, "0.01..100"),
        ("presence_penalty", 3, "-2..2"),
        ("frequency_penalty", -3, "-2..2"),
        ("logit_bias", {"x": 1}, "token ids"),
        ("logit_bias", {"5": 101}, "-100..100"),
        ("logit_bias", {"5": "1"}, "-100..100"),
        ("logit_bias", {"512": 1}, "0..511"),
        ("logit_bias", [1], "an object"),
        ("seed", 2**63, "64-bit"),
        ("seed", "a", "64-bit"),
        ("stop", ["a"] * 5, "up to 4"),
        ("stop", [""], "non-empty"),
        ("stop", 3, "non-empty"),
        ("stop", "x" * 1025, "1024"),
        ("stream", "yes", "true or false"),
        ("stream_options", {"include_usage": True}, "together with stream"),
        ("echo", 1, "true or false"),
        ("logprobs", 6, "0..5"),
        ("logprobs", True, "0..5"),
        ("suffix", "end", "not supported"),
        ("user", 3, "a string"),
    ],
)
def test_a_wrong_value(post: Callable[..., httpx.Response], field: str, value: object, allowed: str) -> None:
    error = error_of(post(json=VALID | {field: value}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]
    assert allowed in error["message"]


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_a_missing_field(post: Callable[..., httpx.Response], field: str) -> None:
    error = error_of(post(json={key: value for key, value in VALID.items() if key != field}), 400)
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


def test_an_unknown_field_is_named(post: Callable[..., httpx.Response]) -> None:
    error = error_of(post(json=VALID | {"tempature": 1}), 400)
    assert (error["param"], error["code"]) == ("tempature", "unknown_parameter")
    assert "temperature" in error["message"]


def test_an_unknown_stream_option_is_named(post: Callable[..., httpx.Response]) -> None:
    error = error_of(post(json=VALID | {"stream": True, "stream_options": {"usage": True}}), 400)
    assert error["param"] == "stream_options.usage"


def test_an_unknown_model(post: Callable[..., httpx.Response]) -> None:
    error = error_of(post(json=VALID | {"model": "gpt"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt" in error["message"]
    assert "scripted" in error["message"]


def test_too_many_choices_in_a_batch(post: Callable[..., httpx.Response]) -> None:
    error = error_of(post(json=VALID | {"prompt": ["x"] * 3, "n": 3}), 400)
    assert error["param"] == "n"
    assert "9 choices" in error["message"]


def test_a_prompt_beyond_the_context(post: Callable[..., httpx.Response]) -> None:
    error = error_of(post(json=VALID | {"prompt": [5] * 300, "max_tokens": 1}), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "300" in error["message"]
    assert "256" in error["message"]


def test_an_oversized_body(post: Callable[..., httpx.Response]) -> None:
    error = error_of(post(json=VALID | {"user": "x" * 20_000}), 413)
    assert error["code"] == "body_too_large"
    assert "20000" in error["message"]


def test_an_oversized_body_of_undeclared_length_is_not_read_to_its_end(post: Callable[..., httpx.Response]) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100_000):
            sent += 4096
            yield b" " * 4096

    # the gateway closes the connection while the client is still writing
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        error_of(post(content=endless()), 413)
    assert sent < 100_000 * 4096


def test_nulls_count_as_absent(post: Callable[..., httpx.Response]) -> None:
    fields = dict.fromkeys(set(CompletionRequest.model_fields) - set(VALID))
    assert post(json=VALID | fields).status_code == 200


def test_what_a_request_accepts_the_verifier_accepts() -> None:
    fields = set(SamplingParams.__dataclass_fields__) & set(CompletionRequest.model_fields) - {"logit_bias", "seed"}
    assert len(fields) == 7
    for field in fields:
        bounds: dict[str, float] = {}
        for constraint in CompletionRequest.model_fields[field].metadata:
            bounds |= {name: getattr(constraint, name) for name in ("ge", "le") if hasattr(constraint, name)}
        for value in bounds.values():
            arguments: dict[str, Any] = {field: max(value, SMALLEST_TOP_P) if field == "top_p" else value}
            SamplingParams(**arguments)


def test_parse_refuses_with_an_api_error() -> None:
    with pytest.raises(ApiError, match="temperature is 3; allowed"):
        CompletionRequest.parse(VALID | {"temperature": 3})
