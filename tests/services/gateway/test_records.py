"""Request records in a real Redis."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import openai
import pytest
import redis

from services.gateway.records import Records, RecordsUnavailable, State, request_key, tokens_key, unpack_tokens
from services.launcher.redis_server import find_redis_server
from services.verifier.request import QueueFull
from tests.services.gateway.conftest import RunningGateway, counter, wait_until


@pytest.fixture
def database(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def record(database: redis.Redis, request_id: str) -> dict[str, str]:
    fields = cast("dict[bytes, bytes]", database.hgetall(request_key(request_id)))
    return {key.decode(): value.decode() for key, value in fields.items()}


def tokens(database: redis.Redis, request_id: str, choice: int = 0) -> list[int]:
    data = database.get(tokens_key(request_id, choice))
    assert isinstance(data, bytes)
    return list(unpack_tokens(data))


def only_record(database: redis.Redis) -> str:
    [name] = {key.decode().split(":")[2] for key in cast("list[bytes]", database.keys("specserve:request:*"))}
    return name


def test_a_finished_request(gateway: RunningGateway, database: redis.Redis) -> None:
    reply = [300, 301, 302, 0]
    gateway.script.reply = lambda request: reply
    before = time.time()
    completion = gateway.client.completions.create(model="scripted", prompt=[[5, 6], [7]], n=2, seed=9, stop="never")
    wait_until(lambda: record(database, completion.id)["state"] == "finished")
    fields = record(database, completion.id)
    assert before <= float(fields["created"]) <= float(fields["first_token"]) <= float(fields["ended"]) <= time.time()
    assert json.loads(fields["prompts"]) == [[5, 6], [7]]
    parameters = {"model": "scripted", "n": 2, "seed": 9, "stop": ["never"]}
    assert json.loads(fields["parameters"]) == parameters
    seeds = json.loads(fields["seeds"])
    assert seeds[:2] == seeds[2:]
    assert seeds[0] == 9
    assert str(fields["owner"])
    assert "error" not in fields
    assert "tokens_lost" not in fields
    for choice in range(4):
        assert tokens(database, completion.id, choice) == reply
        assert 0 < int(str(database.ttl(tokens_key(completion.id, choice)))) <= 3600
    assert 0 < int(str(database.ttl(request_key(completion.id)))) <= 3600


def test_tokens_so_far_and_a_client_that_leaves(gateway: RunningGateway, database: redis.Redis) -> None:
    gateway.script.reply = lambda request: list(range(300, 400))
    gateway.script.delay_s = 0.02
    stream = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100, stream=True)
    request_id = next(iter(stream)).id
    assert record(database, request_id)["state"] == "running"
    wait_until(lambda: bool(database.exists(tokens_key(request_id, 0))))
    stream.close()
    wait_until(lambda: record(database, request_id)["state"] == "cancelled")
    kept = tokens(database, request_id)
    assert 0 < len(kept) < 100
    assert kept == list(range(300, 300 + len(kept)))


def test_a_failed_request(gateway: RunningGateway, database: redis.Redis) -> None:
    gateway.script.refuse = lambda request: QueueFull(8, retry_after_ms=1000)
    with pytest.raises(openai.RateLimitError):
        gateway.client.completions.create(model="scripted", prompt="x")
    fields = record(database, only_record(database))
    assert fields["state"] == "failed"
    assert "queue is full" in fields["error"]


def test_a_refused_request_leaves_no_record(gateway: RunningGateway, database: redis.Redis) -> None:
    with pytest.raises(openai.BadRequestError):
        gateway.client.completions.create(model="scripted", prompt="x", temperature=3)
    assert database.keys("*") == []


def run_records(url: str, scenario: Callable[[Records], Awaitable[None]], on_error: Callable[[], None]) -> None:
    async def main() -> None:
        records = Records(url, owner="me", ttl_s=100, timeout_s=0.5, on_error=on_error)
        try:
            await scenario(records)
        finally:
            await records.close()

    asyncio.run(main())


def test_what_is_pending_is_written_at_the_end(redis_url: str, database: redis.Redis) -> None:
    async def scenario(records: Records) -> None:
        await records.create("a", {}, [[1]], [0])
        records.add_tokens("a", 0, [1, 2])
        await asyncio.sleep(0.2)
        records.add_tokens("a", 0, [3])
        records.add_tokens("a", 1, [4])
        await records.end("a", 2, State.FINISHED, first_token=None)
        records.add_tokens("b", 0, [5])

    run_records(redis_url, scenario, pytest.fail)
    assert tokens(database, "a") == [1, 2, 3]
    assert tokens(database, "a", 1) == [4]
    assert tokens(database, "b") == [5]


def test_a_ttl_is_renewed_now_and_then_and_at_the_end(redis_url: str, database: redis.Redis) -> None:
    keys = [request_key("a"), tokens_key("a", 0)]
    seen: list[list[int]] = []

    def note() -> None:
        seen.append([int(str(database.ttl(key))) for key in keys])
        for key in keys:
            database.expire(key, 60)

    async def scenario(records: Records) -> None:
        await records.create("a", {}, [[1]], [0])
        for token in (1, 2):
            records.add_tokens("a", 0, [token])
            await asyncio.sleep(0.2)
            note()
        await records.end("a", 1, State.FINISHED, first_token=None)
        note()

    run_records(redis_url, scenario, pytest.fail)
    first, second, last = seen
    assert min(first) > 90
    assert max(second) <= 60, "it was renewed a moment ago"
    assert min(last) > 90


def test_a_cancellation_is_never_swallowed(redis_url: str) -> None:
    async def scenario(records: Records) -> None:
        await records.create("a", {}, [[1]], [0])
        for delay in range(100):
            task = asyncio.create_task(records.running("a"))
            for _ in range(delay % 10):
                await asyncio.sleep(0)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task

    run_records(redis_url, scenario, pytest.fail)


@pytest.mark.parametrize("ended", [False, True], ids=["ends later", "ends meanwhile"])
def test_redis_away_and_back(tmp_path: Path, free_port: Callable[[], int], ended: bool) -> None:
    """What could not be written is written when it is back."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    command = [str(find_redis_server()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    errors: list[None] = []

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(url) as client:
            wait_until(lambda: ping(client))
        return process

    def ping(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    process = start()

    async def scenario(records: Records) -> None:
        nonlocal process
        await records.create("a", {}, [[1]], [0])
        records.add_tokens("a", 0, [1, 2])
        await asyncio.sleep(0.2)
        process.terminate()  # saves its data: no --save "" above
        process.wait(5)
        records.add_tokens("a", 0, [3])
        await records.running("a")
        with pytest.raises(RecordsUnavailable, match="Redis"):
            await records.create("b", {}, [[1]], [0])
        with pytest.raises(RecordsUnavailable):
            await records.ping()
        if ended:
            await records.end("a", 1, State.FINISHED, first_token=1.0)
        process = await asyncio.to_thread(start)
        await records.ping()
        if not ended:
            await asyncio.to_thread(wait_until, lambda: state() == "running")
            await records.end("a", 1, State.FINISHED, first_token=1.0)
        await asyncio.to_thread(wait_until, lambda: state() == "finished")

    def state() -> str:
        with redis.Redis.from_url(url) as client:
            return record(client, "a")["state"]

    try:
        run_records(url, scenario, lambda: errors.append(None))
        assert errors
        with redis.Redis.from_url(url) as client:
            assert tokens(client, "a") == [1, 2, 3]
            assert record(client, "a")["state"] == "finished"
    finally:
        process.terminate()
        process.wait(5)


def test_tokens_that_cannot_wait_any_longer_are_dropped_and_the_record_says_so(
    redis_url: str, database: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.records.MAX_PENDING_TOKENS", 3)

    async def scenario(records: Records) -> None:
        await records.create("a", {}, [[1]], [0])
        # a key of another type refuses the write, as a full or read-only Redis would
        await asyncio.to_thread(database.rpush, tokens_key("a", 0), "x")
        records.add_tokens("a", 0, [1, 2, 3, 4])
        await asyncio.sleep(0.2)
        await asyncio.to_thread(database.delete, tokens_key("a", 0))
        records.add_tokens("a", 0, [5])
        await records.end("a", 1, State.FINISHED, first_token=None)

    run_records(redis_url, scenario, lambda: None)
    assert tokens(database, "a") == [0, 0, 0, 0, 5]
    assert record(database, "a")["tokens_lost"] == "1"


def test_ends_that_cannot_wait_any_longer_are_dropped(
    redis_url: str, database: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.records.MAX_UNWRITTEN", 1)

    async def scenario(records: Records) -> None:
        for name in ("a", "b"):
            await asyncio.to_thread(database.rpush, request_key(name), "x")  # refuses the write
            records.add_tokens(name, 0, [1])
            await records.end(name, 1, State.FINISHED, first_token=None)
        await asyncio.to_thread(database.delete, request_key("a"), request_key("b"))

    run_records(redis_url, scenario, lambda: None)
    assert record(database, "b")["state"] == "finished"
    assert record(database, "a") == {}


def test_running_never_comes_behind_the_end(redis_url: str, database: redis.Redis) -> None:
    async def scenario(records: Records) -> None:
        for turn in range(50):
            await records.create(str(turn), {}, [[1]], [0])
            running = asyncio.create_task(records.running(str(turn)))
            await asyncio.sleep(0)
            running.cancel()
            await records.end(str(turn), 1, State.CANCELLED, first_token=None)

    run_records(redis_url, scenario, pytest.fail)
    assert {record(database, str(turn))["state"] for turn in range(50)} == {"cancelled"}


def test_a_stream_goes_on_without_redis(
    start_gateway: Callable[..., RunningGateway], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    command = [str(find_redis_server()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        gateway = start_gateway(redis_url=f"redis://127.0.0.1:{port}/0")
        text = "one two three four five"
        gateway.says(text)
        gateway.script.delay_s = 0.02
        wait_until(lambda: gateway.get("/ready").status_code == 200)
        shown = ""
        for event in gateway.client.completions.create(model="scripted", prompt="x", stream=True, max_tokens=99):
            if not shown:
                process.terminate()
                process.wait(5)
            shown += event.choices[0].text
        assert shown == text
        wait_until(lambda: counter(gateway, "specserve_gateway_record_errors_total") > 0)
        ready = gateway.get("/ready")
        assert ready.status_code == 503
        assert set(ready.json()["missing"]) == {"redis"}
    finally:
        process.terminate()
        process.wait(5)
