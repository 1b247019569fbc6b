from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.services.gateway.conftest import RunningGateway, wait_until


def test_models(gateway: RunningGateway) -> None:
    client = gateway.client
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "specserve")
    assert client.models.retrieve("scripted") == model
    with pytest.raises(openai.NotFoundError, match="'other' is not served") as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_hub_id_has_a_slash(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway(facts={"model": "someone/a-model"})
    assert gateway.get("/v1/models/someone/a-model").json()["id"] == "someone/a-model"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/chat/completions", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_and_methods(gateway: RunningGateway, method: str, path: str, status: int, code: str) -> None:
    response = httpx.request(method, gateway.url + path)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert path in error["message"]
    assert ("allow" in response.headers) == (status == 405)


def test_alive_and_ready(gateway: RunningGateway) -> None:
    assert gateway.get("/health").json() == {"status": "alive"}
    response = gateway.get("/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready", "missing": {}})


@pytest.mark.parametrize(
    ("settings", "part", "reason"),
    [
        ({"verifier": "127.0.0.1:1"}, "verifier", "unavailable"),
        ({"facts": {"tokenizer_hash": "f00d"}}, "tokenizer", "f00d"),
        ({"redis_url": "redis://127.0.0.1:1/0"}, "redis", "Redis"),
    ],
)
def test_ready_names_the_missing_part(
    start_gateway: Callable[..., RunningGateway], settings: dict[str, Any], part: str, reason: str
) -> None:
    gateway = start_gateway(**settings)
    response = gateway.get("/ready")
    assert response.status_code == 503
    assert set(response.json()["missing"]) == {part}
    assert reason in response.json()["missing"][part]
    assert gateway.get("/health").status_code == 200


def test_metrics(gateway: RunningGateway) -> None:
    gateway.says("hello there")
    gateway.script.step_size = 3
    gateway.client.completions.create(model="scripted", prompt="x")
    wait_until(lambda: 'gateway_requests_total{status="200"} 1.0' in gateway.get("/metrics").text)
    values = dict(line.rsplit(" ", 1) for line in gateway.get("/metrics").text.splitlines() if line[0] != "#")
    tokens, steps = (float(values[f"specserve_gateway_{name}_total"]) for name in ("completion_tokens", "llm_steps"))
    assert tokens == len(gateway.tokenizer.encode("hello there").ids) + 1
    assert steps == -(-tokens // 3)
    assert values["specserve_gateway_time_to_first_token_seconds_count"] == "1.0"
    assert float(values["specserve_gateway_inter_token_seconds_count"]) == steps - 1
    assert values["specserve_gateway_open_streams"] == "0.0"


def test_the_schema_of_the_api(gateway: RunningGateway) -> None:
    paths = gateway.get("/openapi.json").json()["paths"]
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "max_tokens", "logit_bias"} <= set(body["properties"])


def test_a_fault_of_the_gateway_has_openais_shape(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("services.gateway.exchange.plan_completion", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        gateway.client.completions.create(model="scripted", prompt="x")
    assert caught.value.code == "internal_error"
    assert "a fault" not in caught.value.message
