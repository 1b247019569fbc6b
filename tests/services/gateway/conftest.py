"""A whole gateway on loopback: real HTTP, real gRPC, real Redis, and a verifier that plays a script."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from services.common.lifecycle import Lifecycle
from services.common.model_files import tokenizer_hash
from services.gateway.server import serve
from services.gateway.settings import GatewaySettings
from tests.services.gateway.scripted_verifier import Facts, Script, ScriptedVerifier, running
from tests.services.gateway.tokenizers_for_tests import byte_fallback, byte_level, save

START_TIMEOUT_S = 10.0


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder with a byte-level tokenizer."""
    return save(byte_level(), tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def byte_fallback_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder with a byte-fallback tokenizer."""
    return save(byte_fallback(), tmp_path_factory.mktemp("byte_fallback"))


@dataclass
class RunningGateway:
    """A gateway in a thread of its own, and what a test may do to it.

    client: OpenAI's SDK, without its retries.
    """

    url: str
    verifier: str
    script: Script
    servicer: ScriptedVerifier
    tokenizer: Tokenizer
    lifecycle: Lifecycle
    loop: asyncio.AbstractEventLoop
    client: openai.OpenAI

    def get(self, path: str) -> httpx.Response:
        """The answer to a GET."""
        return httpx.get(self.url + path, timeout=10)

    def says(self, text: str, *, end: bool = True) -> None:
        """Script the reply."""
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False).ids, *([0] if end else [])]
        self.script.reply = lambda request: tokens


@contextmanager
def in_thread(context: Callable[[], Any]) -> Iterator[tuple[Any, asyncio.AbstractEventLoop]]:
    """Enter an async context in an event loop of its own thread; yields what it yields and the loop."""
    started, stop = threading.Event(), asyncio.Event()
    result: list[Any] = []

    async def main() -> None:
        async with context() as value:
            result.extend((value, asyncio.get_running_loop()))
            started.set()
            await stop.wait()

    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  # told to the test's thread
            failure.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(START_TIMEOUT_S)
    if failure:
        raise failure[0]
    try:
        yield result[0], result[1]
    finally:
        result[1].call_soon_threadsafe(stop.set)
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive()
        if failure:
            raise failure[0]


@contextmanager
def gateway_starter(
    redis_url: str, default_folder: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., RunningGateway]]:
    """Yields start(folder=..., facts={...}, **settings), which starts a gateway with a scripted verifier."""
    with ExitStack() as stack:

        def start(
            folder: Path = default_folder, facts: dict[str, Any] | None = None, **settings: Any
        ) -> RunningGateway:
            script = Script(lambda request: [0])
            told = replace(Facts(tokenizer_hash(folder)), **(facts or {}))
            servicer = ScriptedVerifier(told, script)
            port = free_port()

            @asynccontextmanager
            async def context() -> AsyncIterator[Lifecycle]:
                lifecycle = Lifecycle()
                async with AsyncExitStack() as running_parts:
                    if "verifier" not in settings:
                        verifier_port = await running_parts.enter_async_context(running(servicer))
                        settings["verifier"] = f"127.0.0.1:{verifier_port}"
                    given = settings["verifier"]
                    addresses = {"verifier": (given,) if isinstance(given, str) else given}
                    security = {} if "tls_cert" in settings else {"insecure": True}
                    chosen = GatewaySettings(
                        **({"redis_url": redis_url} | security | settings | addresses), model=str(folder), port=port
                    )
                    await running_parts.enter_async_context(serve(chosen, lifecycle))
                    yield lifecycle

            lifecycle, loop = stack.enter_context(in_thread(context))
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            url = f"http://127.0.0.1:{port}"
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10)
            stack.enter_context(client)
            return RunningGateway(url, settings["verifier"], script, servicer, tokenizer, lifecycle, loop, client)

        yield start


@pytest.fixture
def start_gateway(
    redis_url: str, byte_level_folder: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., RunningGateway]]:
    """Starts gateways that end with the test."""
    with gateway_starter(redis_url, byte_level_folder, free_port) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_gateway(
    _redis_process: str, byte_level_folder: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., RunningGateway]]:
    """Starts gateways that end with the module."""
    with gateway_starter(_redis_process, byte_level_folder, free_port) as start:
        yield start


@pytest.fixture
def gateway(start_gateway: Callable[..., RunningGateway]) -> RunningGateway:
    """A gateway with its defaults."""
    return start_gateway()


def counter(gateway: RunningGateway, name: str, **labels: str) -> float:
    """Value of a metric of the gateway; 0 when it has none yet."""
    return gateway.lifecycle.registry.get_sample_value(name, labels) or 0.0


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Return as soon as the condition holds; fails when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
