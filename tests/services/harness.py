"""Runs services in this process on a loop of their own, and talks to them over real gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from prometheus_client import CollectorRegistry

from protos import tree_pb2, verifier_pb2
from protos.verifier_pb2_grpc import VerifierStub
from services.common.grpc_setup import channel
from services.common.lifecycle import Lifecycle
from services.common.service import Serve
from services.common.settings import ServiceSettings
from services.common.tls import INSECURE
from services.speculator.server import serve as serve_speculator
from services.speculator.settings import SpeculatorSettings
from services.verifier.local_speculator import Answers
from services.verifier.server import serve as serve_verifier
from services.verifier.settings import VerifierSettings
from tests.ports import free_port

S = TypeVar("S", bound=ServiceSettings)
Host = Callable[[CollectorRegistry], Answers]

TIMEOUT_S = 120
DRAIN = {"drain_timeout_s": 5.0}


class Services:
    """Every service started here ends with the object's context, last one first."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="services", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self.registries: dict[int, CollectorRegistry] = {}

    def close(self) -> None:
        """Stop all services; a second call does nothing."""
        if self._loop.is_closed():
            return
        self._call(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    def speculator(self, *ssms: Path, port: int = 0, **settings: Any) -> str:
        """Start a speculator; return its address."""
        port = port or free_port()
        values: dict[str, Any] = {
            "ssm": tuple(map(str, ssms)),
            "port": port,
            "kv_memory": 0.01,
            "threads": 1,
            "insecure": "tls_cert" not in settings,
        } | settings
        self._start(SpeculatorSettings(**values), serve_speculator)
        return f"127.0.0.1:{port}"

    def verifier(self, llm: Path, *speculators: str, host: Host | None = None, **settings: Any) -> Verifier:
        """Start a verifier and return a client of it. Unlike by default, every sequence drafts whole trees.

        host: makes a speculator inside of it.
        """
        port = free_port()
        values: dict[str, Any] = {
            "llm": str(llm),
            "port": port,
            "speculator": speculators,
            "draft_always": True,
            "step_times": "none",
            "kv_memory": 0.01,
            "threads": 1,
            "insecure": "tls_cert" not in settings,
        } | settings
        registry = self._start(VerifierSettings(**values), partial(serve_verifier, host=host))
        return Verifier(f"127.0.0.1:{port}", registry)

    def _start(self, settings: S, serve: Serve[S]) -> CollectorRegistry:
        async def enter() -> CollectorRegistry:
            lifecycle = Lifecycle(CollectorRegistry())
            service = _drained(serve(settings, lifecycle), lifecycle, settings.drain_timeout_s)
            await self._stack.enter_async_context(service)
            return lifecycle.registry

        registry: CollectorRegistry = self._call(enter())
        return registry

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)


class _drained(AbstractAsyncContextManager[None]):
    """A service's context that drains before it ends, as a process does."""

    def __init__(self, service: AbstractAsyncContextManager[None], lifecycle: Lifecycle, timeout_s: float) -> None:
        self._service = service
        self._lifecycle = lifecycle
        self._timeout_s = timeout_s

    async def __aenter__(self) -> None:
        await self._service.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self._lifecycle.drain(self._timeout_s)
        await self._service.__aexit__(*error)


@contextmanager
def services() -> Iterator[Services]:
    running = Services()
    try:
        yield running
    finally:
        running.close()


@dataclass(frozen=True)
class Generated:
    """What came of one sequence."""

    token_ids: list[int]
    finish_reason: int
    llm_steps: int
    outputs: list[verifier_pb2.SequenceOutput] = field(repr=False)


class SequenceFailed(Exception):
    """A sequence ended without a finish reason."""

    def __init__(self, failure: verifier_pb2.SequenceFailure) -> None:
        super().__init__(failure.message)
        self.reason = failure.reason
        self.retry_after_ms = failure.retry_after_ms


class Begun:
    """One sequence on a stream of its own."""

    def __init__(self, connection: grpc.Channel, sequence: verifier_pb2.BeginSequence) -> None:
        messages = iter([verifier_pb2.GenerateRequest(begin=[sequence])])
        self._call = VerifierStub(connection).Generate(messages, timeout=TIMEOUT_S)

    def admitted(self) -> None:
        """Return when it is queued; SequenceFailed if it is not."""
        response = next(self._call)
        for failure in response.failures:
            raise SequenceFailed(failure)
        assert response.admitted

    def outputs(self) -> Iterator[verifier_pb2.SequenceOutput]:
        """What its steps gave it; SequenceFailed if it fails."""
        for response in self._call:
            yield from response.outputs
            for failure in response.failures:
                raise SequenceFailed(failure)

    def cancel(self) -> None:
        self._call.cancel()


class Verifier:
    """A client of a running verifier."""

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        self.address = address
        self.registry = registry

    def generate(self, prompt: list[int], new_tokens: int, **options: Any) -> Generated:
        """Generate greedily unless `sampling` says otherwise; waits for the end."""
        with channel(self.address, INSECURE) as connection:
            outputs = list(Begun(connection, request(prompt, new_tokens, **options)).outputs())
        tokens = [token for output in outputs for token in output.token_ids]
        return Generated(tokens, outputs[-1].finish_reason, outputs[-1].llm_steps, outputs)

    def info(self) -> tree_pb2.ModelInfo:
        with channel(self.address, INSECURE) as connection:
            return VerifierStub(connection).GetModelInfo(tree_pb2.ModelInfoRequest(), timeout=TIMEOUT_S)

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 when it was never touched."""
        return self.registry.get_sample_value(f"specserve_verifier_{name}", labels) or 0.0


GREEDY = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}


def request(
    prompt: list[int], new_tokens: int, sampling: dict[str, Any] | None = None, **fields: Any
) -> verifier_pb2.BeginSequence:
    return verifier_pb2.BeginSequence(
        sequence_id=1,
        prompt_token_ids=prompt,
        max_new_tokens=new_tokens,
        sampling=tree_pb2.SamplingParams(**(GREEDY | (sampling or {}))),
        **fields,
    )


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    assert isinstance(error, grpc.Call)
    return error.code(), error.details() or ""
