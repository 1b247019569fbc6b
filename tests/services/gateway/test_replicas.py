"""Several verifiers behind one gateway: which one gets a request, and which one never does."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from services.common.model_files import tokenizer_hash
from services.common.settings import SettingsError
from services.gateway.settings import GatewaySettings
from services.gateway.verifier_client import VerifierClient
from services.verifier.request import QueueFull
from tests.services.gateway.conftest import RunningGateway, counter, in_thread, wait_until
from tests.services.gateway.scripted_verifier import Facts, Script, ScriptedVerifier, running

REPLY = [300] * 20


class Pair:
    """Two scripted verifiers that answer the same."""

    def __init__(self, folder: Path, stack: ExitStack, port: int) -> None:
        facts = Facts(tokenizer_hash(folder))
        self.scripts = [Script(lambda request: REPLY) for _ in range(2)]
        self.servicers = [ScriptedVerifier(facts, script) for script in self.scripts]
        self.addresses: tuple[str, ...] = ()
        for servicer, host in zip(self.servicers, ("127.0.0.1", "127.0.0.2"), strict=True):
            stack.enter_context(in_thread(partial(running, servicer, port, host=host)))
            self.addresses += (f"{host}:{port}",)

    @property
    def requests(self) -> list[int]:
        return [len(script.requests) for script in self.scripts]


@pytest.fixture
def pair(byte_level_folder: Path, free_port: Callable[[], int]) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(byte_level_folder, stack, free_port())


def up(gateway: RunningGateway, *addresses: str) -> bool:
    """Whether the gateway takes these for usable."""
    return all(counter(gateway, "specserve_gateway_verifier_up", verifier=address) for address in addresses)


def ask(gateway: RunningGateway, **options: Any) -> openai.types.Completion:
    answer = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=20, **options)
    assert isinstance(answer, openai.types.Completion)
    return answer


def test_the_least_loaded_gets_the_next(start_gateway: Callable[..., RunningGateway], pair: Pair) -> None:
    for script in pair.scripts:
        script.delay_s = 0.05
    gateway = start_gateway(verifier=pair.addresses)
    wait_until(lambda: up(gateway, *pair.addresses))
    assert len(ask(gateway, n=6).choices) == 6
    assert pair.requests == [3, 3]
    open_streams = "specserve_gateway_verifier_open_streams"
    wait_until(lambda: not any(counter(gateway, open_streams, verifier=address) for address in pair.addresses))


def test_a_full_one_is_passed_over(start_gateway: Callable[..., RunningGateway], pair: Pair) -> None:
    pair.scripts[0].refuse = lambda request: QueueFull(8, retry_after_ms=4000)
    gateway = start_gateway(verifier=pair.addresses)
    wait_until(lambda: up(gateway, *pair.addresses))
    for _ in range(4):
        assert ask(gateway).choices[0].finish_reason == "length"
    pair.scripts[1].refuse = lambda request: QueueFull(8, retry_after_ms=2000)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(gateway)
    assert caught.value.response.headers["retry-after"] == "2"


def test_a_lost_generation_goes_on_at_the_other(start_gateway: Callable[..., RunningGateway], pair: Pair) -> None:
    pair.scripts[0].lost_after, pair.scripts[0].losses = 7, 100
    gateway = start_gateway(verifier=pair.addresses)
    wait_until(lambda: up(gateway, *pair.addresses))
    completion = ask(gateway, n=2)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 2 * len(REPLY)
    first, second = completion.choices
    assert first.text == second.text
    assert sorted(len(request.generated) for request in pair.scripts[1].requests) == [0, 7]


@pytest.mark.parametrize(("fact", "value"), [("model", "another"), ("context_length", 128)])
def test_another_model_is_refused_with_both_values(
    start_gateway: Callable[..., RunningGateway],
    pair: Pair,
    fact: str,
    value: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = pair.servicers[0].facts
    pair.servicers[1].facts = replace(first, **{fact: value})  # type: ignore[arg-type]  # the names and types are ours
    gateway = start_gateway(verifier=pair.addresses)
    wait_until(lambda: any(up(gateway, address) for address in pair.addresses))
    wait_until(lambda: "verifier not usable" in caplog.text)
    (reason,) = (vars(record)["reason"] for record in caplog.records if record.msg == "verifier not usable")
    assert reason.startswith(f"{fact} ")
    assert {str(value), str(getattr(first, fact))} <= set(reason.split())
    assert [up(gateway, address) for address in pair.addresses].count(True) == 1
    assert gateway.get("/ready").status_code == 200


def test_a_name_stands_for_all_its_addresses(
    start_gateway: Callable[..., RunningGateway], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the name loses gets no new requests, and is forgotten when its last one has ended."""
    hosts = ["127.0.0.1", "127.0.0.2"]
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> list[Any]:
        if host != "verifiers.example":
            return list(real(host, port, *rest, **options))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("services.gateway.replicas.RESOLVE_S", 0.1)
    port = pair.addresses[0].rpartition(":")[2]
    gateway = start_gateway(verifier=f"verifiers.example:{port}")
    wait_until(lambda: up(gateway, *pair.addresses))
    ask(gateway, n=4)
    assert pair.requests == [2, 2]
    del hosts[0]
    wait_until(lambda: pair.addresses[0] not in gateway.get("/metrics").text)
    ask(gateway, n=4)
    assert pair.requests == [2, 6]


def test_one_that_the_name_has_lost_does_not_stand_for_the_others(
    start_gateway: Callable[..., RunningGateway],
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    free_port: Callable[[], int],
) -> None:
    """It still ends what it has begun; new requests are refused soon, since nobody is there for them."""
    answer = [("127.0.0.1", int(pair.addresses[0].rpartition(":")[2]))]
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> list[Any]:
        if host != "verifiers.example":
            return list(real(host, port, *rest, **options))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in answer]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("services.gateway.replicas.RESOLVE_S", 0.1)
    pair.scripts[0].delay_s = 0.2
    gateway = start_gateway(verifier=f"verifiers.example:{answer[0][1]}")
    wait_until(lambda: up(gateway, pair.addresses[0]))
    stream = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=20, stream=True)
    assert isinstance(stream, openai.Stream)
    begun = iter(stream)
    next(begun)
    answer[0] = ("127.0.0.3", answer[0][1])
    wait_until(lambda: not up(gateway, pair.addresses[0]))
    asked = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(gateway)
    assert caught.value.status_code == 503
    assert time.monotonic() - asked < 2, "before the other has ended"
    assert list(begun)[-1].choices[0].finish_reason == "length"


def test_a_check_that_fails_for_one_request_does_not_lose_the_verifier_for_all(
    start_gateway: Callable[..., RunningGateway], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start_gateway(verifier=pair.addresses)
    wait_until(lambda: up(gateway, *pair.addresses))
    late = [False]
    serving = VerifierClient.serving

    async def late_once(client: VerifierClient, timeout_s: float) -> bool:
        return late.pop() if late else await serving(client, timeout_s)

    monkeypatch.setattr(VerifierClient, "serving", late_once)
    for script in pair.scripts:
        script.lost_after, script.losses = 3, 1
    assert ask(gateway).choices[0].finish_reason == "length"
    assert up(gateway, *pair.addresses)


@pytest.mark.parametrize("address", ["localhost", "localhost:http", ":50051", "localhost:70000"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=f"--verifier: '{address}' is not HOST:PORT"):
        GatewaySettings(model="m", verifier=(address,), insecure=True)
