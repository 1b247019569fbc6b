"""A service as a process: a real gRPC server, real signals."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import verifier_pb2, verifier_pb2_grpc
from protos.tree_pb2 import ModelInfoRequest
from services.common.grpc_setup import aio_channel, channel, is_serving
from services.common.tls import INSECURE
from tests.services.common.example_service import SERVICE

TIMEOUT_S = 10.0
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def start_example(*flags: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.services.common.example_service",
                *(flags if "--tls-cert" in flags else ("--insecure", *flags)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_example
    for process in processes:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    word, port = process.stdout.readline().split()
    assert word == "port"
    return int(port)


def stub_of(connection: grpc.Channel) -> verifier_pb2_grpc.VerifierStub:
    return verifier_pb2_grpc.VerifierStub(connection)


def generate(connection: grpc.Channel, tokens: int) -> Any:
    message = verifier_pb2.GenerateRequest(begin=[verifier_pb2.BeginSequence(max_new_tokens=tokens)])
    return stub_of(connection).Generate(iter([message]), timeout=TIMEOUT_S)


def test_a_drain_finishes_open_calls_refuses_new_ones_and_exits_with_0(start: Start) -> None:
    process = start()
    with channel(f"127.0.0.1:{port_of(process)}", INSECURE) as connection:
        health: Any = health_pb2_grpc.HealthStub(connection)  # its type stub lacks the calls
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        call = generate(connection, 40)
        next(call)
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as refused:
            next(generate(connection, 1))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(refused.value.details())
        assert len(list(call)) == 39
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "freed" in out
    assert "open=1" in err


def test_a_drain_that_runs_out_of_time_cancels_what_is_open(start: Start) -> None:
    process = start("--drain-timeout-s", "0.1")
    with channel(f"127.0.0.1:{port_of(process)}", INSECURE) as connection:
        call = generate(connection, 100_000)
        next(call)
        process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as cancelled:
            list(call)
    assert cancelled.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "drain timed out" in err


def test_a_second_signal_exits_at_once(start: Start) -> None:
    process = start("--drain-timeout-s", "60")
    with channel(f"127.0.0.1:{port_of(process)}", INSECURE) as connection:
        call = generate(connection, 100_000)
        next(call)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "draining" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGINT


def test_a_signal_during_the_start_ends_it(start: Start) -> None:
    process = start("--load-s", "60", "--metrics-port", "0")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM


def test_a_failed_start_is_one_line_and_exit_code_1(start: Start) -> None:
    out, err = start("--refuse").communicate(timeout=TIMEOUT_S)
    assert (out, err) == ("", "verifier: it was told to fail\n")


def test_a_taken_port_is_named(start: Start) -> None:
    port = port_of(start())
    second = start("--port", str(port))
    _, err = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 1
    assert f"verifier: cannot listen on 127.0.0.1:{port}" in err.splitlines()[-1]
    assert "--port" in err.splitlines()[-1]


def test_a_failure_while_serving_drains_and_exits_with_1(start: Start) -> None:
    process = start("--fail-after-s", "0.1")
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "the engine died" in err
    assert "freed" in out


def test_exceptions_become_statuses(start: Start) -> None:
    with channel(f"127.0.0.1:{port_of(start())}", INSECURE) as connection:
        with pytest.raises(grpc.RpcError) as empty:
            next(stub_of(connection).Generate(iter([verifier_pb2.GenerateRequest()]), timeout=TIMEOUT_S))
        assert empty.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert empty.value.details() == "there is nothing to do"
        with pytest.raises(grpc.RpcError) as bug:
            stub_of(connection).GetModelInfo(ModelInfoRequest(), timeout=TIMEOUT_S)
        assert bug.value.code() is grpc.StatusCode.INTERNAL
        assert "ZeroDivisionError" in str(bug.value.details())
        assert "a bug" not in str(bug.value.details())


def test_is_serving_tells_a_live_server_from_an_empty_port(start: Start, free_port: Callable[[], int]) -> None:
    async def ask(port: int, service: str = "") -> bool:
        async with aio_channel(f"127.0.0.1:{port}", INSECURE) as connection:
            return await is_serving(connection, service)

    port = port_of(start())
    assert asyncio.run(ask(port))
    assert asyncio.run(ask(port, SERVICE))
    assert not asyncio.run(ask(port, "specserve.v1.Nobody"))
    assert not asyncio.run(ask(free_port()))


def test_the_metrics_endpoint_shows_the_process(start: Start, free_port: Callable[[], int]) -> None:
    port = free_port()
    port_of(start("--metrics-port", str(port)))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as response:
        assert b"process_resident_memory_bytes" in response.read()
