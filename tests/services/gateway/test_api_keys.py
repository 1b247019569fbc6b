"""API keys: who is admitted, what is stored, what a changed file does."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from services.common.lifecycle import StartupError
from services.gateway.api_keys import OPEN_PATHS, ApiKeys, hash_key, new_key
from tests.services.gateway.conftest import RunningGateway

PATHS = ("/v1/completions", "/v1/models", "/v1/models/x", "/metrics", "/openapi.json")


@pytest.fixture
def keys() -> list[str]:
    return [new_key() for _ in range(3)]


def write(file: Path, *keys: str) -> Path:
    file.write_text("# ours\n\n" + "".join(f"{hash_key(key)}  # a user's\n" for key in keys))
    return file


def test_only_a_known_key_is_served(
    start_gateway: Callable[..., RunningGateway],
    keys: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = start_gateway(api_keys_file=write(tmp_path / "keys", keys[0]), api_keys=(hash_key(keys[1]),))
    gateway.says("hello")
    for key in keys[:2]:
        client = gateway.client.with_options(api_key=key)
        assert client.completions.create(model="scripted", prompt="x").choices[0].text == "hello"
    with pytest.raises(openai.AuthenticationError) as caught:
        gateway.client.with_options(api_key=keys[2]).completions.create(model="scripted", prompt="x")
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert not [key for key in keys if key in caplog.text or hash_key(key) in caplog.text]


@pytest.mark.parametrize("path", [*PATHS, "/no"])
@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer x", "Basic KEY", "KEY"])
def test_every_route_but_the_probes_asks_for_one(
    start_module_gateway: Callable[..., RunningGateway], path: str, authorization: str | None
) -> None:
    key = new_key()
    gateway = start_module_gateway(api_keys=(hash_key(key),))
    headers = {} if authorization is None else {"authorization": authorization.replace("KEY", key)}
    for method in ("GET", "POST"):
        refused = httpx.request(method, gateway.url + path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert ("no API key" in refused.text) == (authorization is None)
    for probe in ("/health", "/ready"):
        assert gateway.get(probe).status_code == 200


def test_no_route_is_left_out(gateway: RunningGateway) -> None:
    schema = gateway.get("/openapi.json").json()
    assert {path.replace("{name}", "x") for path in schema["paths"]} == {*PATHS, *OPEN_PATHS} - {"/openapi.json"}


def test_every_key_is_compared_with_every_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time each, wherever the match is: the time of an answer tells nothing about the known hashes."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counting(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return compare(given, known)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys = [new_key() for _ in range(5)]
    known = ApiKeys(None, [hash_key(key) for key in keys])
    assert not known.admits(new_key())
    order, places = list(compared), set()
    assert sorted(order) == sorted(hash_key(key).encode() for key in keys)
    for key in keys:
        compared.clear()
        assert known.admits(key)
        assert compared == order
        places.add(compared.index(hash_key(key).encode()))
    assert places == set(range(len(keys))), "the match was first, last and in between"


def test_a_changed_file_takes_effect(keys: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "keys", keys[0])
    known = ApiKeys(file)
    write(tmp_path / "next", keys[1]).replace(file)
    assert [known.admits(key) for key in keys] == [False, True, False]
    (tmp_path / "next").write_text(keys[2])
    (tmp_path / "next").replace(file)
    assert [known.admits(key) for key in keys] == [False, True, False]
    assert "changed API keys refused" in caplog.text
    file.unlink()
    assert [known.admits(key) for key in keys] == [False, True, False]
    write(file)
    assert [known.admits(key) for key in keys] == [False, False, False]


def test_a_line_that_is_no_hash_is_named_but_not_shown(keys: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "keys", keys[0])
    with file.open("a") as lines:
        lines.write(keys[1])
    with pytest.raises(StartupError, match="keys, line 4: not a hash") as error:
        ApiKeys(file)
    assert keys[1] not in str(error.value)
    with pytest.raises(StartupError, match="cannot read it"):
        ApiKeys(tmp_path / "nowhere")


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="has 8 characters"):
        hash_key("password")
