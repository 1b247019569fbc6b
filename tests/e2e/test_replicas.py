"""Two real verifiers behind one gateway: one is killed, drained, full."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from services.common.grpc_setup import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS, channel
from services.common.tls import INSECURE
from services.launcher.settings import EMBEDDED_LLM
from tests.services.gateway.conftest import RunningGateway, counter, gateway_starter, wait_until
from tests.services.harness import Begun, request

START_TIMEOUT_S = 90.0
TOKENS = 60
OPEN_STREAMS = "specserve_gateway_verifier_open_streams"


class Replicas:
    """A gateway in this process, and its verifiers, each a process; the queue of one holds a single sequence.

    They take some ten milliseconds for a token, so that what happens in the middle of a text does on any machine.
    """

    def __init__(self, ports: list[int], start: Callable[..., RunningGateway]) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in ports]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.gateway = start(verifier=tuple(self.addresses))

    def start(self) -> None:
        """Start those that do not run, and wait until the gateway uses them."""
        for address in self.addresses:
            if address not in self.processes or self.processes[address].poll() is not None:
                flags = ["--port", address.rpartition(":")[2], "--llm", EMBEDDED_LLM, "--insecure"]
                slow = ["--kernels", "torch", "--threads", "1"]
                bounds = ["--max-sequences", "1", "--max-waiting", "1", "--kv-memory", "0.02"]
                command = [sys.executable, "-m", "services.verifier", *flags, *slow, *bounds]
                self.processes[address] = subprocess.Popen([*command, "--log-level", "error"])
        wait_until(lambda: all(map(self.up, self.addresses)), START_TIMEOUT_S)

    def up(self, address: str) -> bool:
        return counter(self.gateway, "specserve_gateway_verifier_up", verifier=address) == 1

    def busy(self) -> str:
        """The one that generates."""
        (address,) = (each for each in self.addresses if counter(self.gateway, OPEN_STREAMS, verifier=each))
        return address

    def stream(self) -> Iterator[str]:
        """The pieces of a sampled text that its seed fixes."""
        events = self.gateway.client.with_options(timeout=60).completions.create(
            model="default-llm", prompt="Once upon a time", max_tokens=TOKENS, temperature=1, seed=11, stream=True
        )
        for event in events:
            yield event.choices[0].text

    def short(self) -> openai.types.Completion:
        return self.gateway.client.completions.create(model="default-llm", prompt="Then", max_tokens=2)


@pytest.fixture(scope="module")
def module_replicas(_redis_process: str, free_port: Callable[[], int]) -> Iterator[Replicas]:
    with gateway_starter(_redis_process, Path(EMBEDDED_LLM), free_port) as start:
        replicas = Replicas([free_port(), free_port()], start)
        try:
            yield replicas
        finally:
            for process in replicas.processes.values():
                process.kill()
                process.wait(10)


@pytest.fixture
def replicas(module_replicas: Replicas) -> Replicas:
    """Both run."""
    module_replicas.start()
    return module_replicas


@contextmanager
def filled(address: str) -> Iterator[None]:
    """The verifier's only place and its queue are taken."""
    with channel(address, INSECURE) as connection:
        running = Begun(connection, request([5, 6, 7], 400))
        next(running.outputs())
        waiting = Begun(connection, request([5, 6, 7], 400))
        waiting.admitted()
        try:
            yield
        finally:
            waiting.cancel()
            running.cancel()


def test_a_killed_one_has_its_text_finished_by_the_other(replicas: Replicas) -> None:
    whole = "".join(replicas.stream())
    retries = counter(replicas.gateway, "specserve_gateway_verifier_retries_total")
    pieces = replicas.stream()
    text = next(pieces)
    victim = replicas.busy()
    replicas.processes[victim].kill()
    text += "".join(pieces)
    assert text == whole
    assert counter(replicas.gateway, "specserve_gateway_verifier_retries_total") > retries
    assert not replicas.up(victim)
    assert replicas.gateway.get("/ready").status_code == 200


def test_a_hung_one_has_its_text_finished_by_the_other(replicas: Replicas) -> None:
    whole = "".join(replicas.stream())
    pieces = replicas.stream()
    text = next(pieces)
    victim = replicas.busy()
    replicas.processes[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    text += "".join(pieces)
    assert text == whole
    assert time.monotonic() - stopped < (KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS) / 1000 + 10
    assert not replicas.up(victim)
    assert replicas.short().choices[0].text
    replicas.processes[victim].send_signal(signal.SIGCONT)


def test_a_draining_one_finishes_its_text_and_gets_no_other(replicas: Replicas) -> None:
    whole = "".join(replicas.stream())
    retries = counter(replicas.gateway, "specserve_gateway_verifier_retries_total")
    pieces = replicas.stream()
    text = next(pieces)
    leaving = replicas.busy()
    replicas.processes[leaving].send_signal(signal.SIGTERM)
    wait_until(lambda: not replicas.up(leaving))
    assert counter(replicas.gateway, OPEN_STREAMS, verifier=leaving) == 1
    assert replicas.short().choices[0].text
    text += "".join(pieces)
    assert text == whole
    assert counter(replicas.gateway, "specserve_gateway_verifier_retries_total") == retries
    assert replicas.processes[leaving].wait(30) == 0


def test_a_full_one_sends_requests_to_the_other(replicas: Replicas) -> None:
    first, second = replicas.addresses
    with filled(first):
        for _ in range(3):
            assert replicas.short().choices[0].text
        with filled(second), pytest.raises(openai.RateLimitError) as caught:
            replicas.short()
        assert caught.value.code == "queue_full"
