"""The request's record in Redis: the only state of a request outside the process that serves it.

Keys, all with the TTL of the settings, of which every write leaves at least three quarters:

    specserve:request:{id}                  hash
        state         queued | running | finished | failed | cancelled
        owner         the gateway process that serves the request
        parameters    JSON: the request's fields but the prompt
        prompts       JSON: token ids of each prompt
        seeds         JSON: the seed of each choice
        created, first_token, ended    Unix times in seconds; the later ones are absent until then
        error         why it failed
        tokens_lost   1 when Redis was away for so long that tokens are missing from the record
    specserve:request:{id}:tokens:{choice}  string: uint32 little-endian, token i of the choice at byte 4 i

A write of tokens names its place, so that repeating it after a timeout changes nothing. What could not be written while
Redis was away is written when it is back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

import redis.asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
# How long a burst of requests may wait for one of them.
POOL_TIMEOUT_S = 5.0
FLUSH_INTERVAL_S = 0.05
# Between attempts to write while Redis is away.
AWAY_INTERVAL_S = 1.0
MAX_PENDING_TOKENS = 1 << 18
MAX_UNWRITTEN = 1 << 14


Fields = dict[str | int | float | bytes | bytearray | memoryview, str | int | float | bytes | bytearray | memoryview]


class State(StrEnum):
    """Where a request stands."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RecordsUnavailable(Exception):
    """Redis cannot be reached or refuses the write."""


def request_key(request_id: str) -> str:
    """Key of a request's hash."""
    return f"specserve:request:{request_id}"


def tokens_key(request_id: str, choice: int) -> str:
    """Key of a choice's tokens."""
    return f"{request_key(request_id)}:tokens:{choice}"


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """The stored form of tokens."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """Inverse of pack_tokens."""
    return struct.unpack(f"<{len(data) // 4}I", data)


@dataclass
class _Pending:
    """Tokens of one choice that are not in Redis yet; `offset` tokens are. renewed: when their TTL last was."""

    offset: int = 0
    token_ids: list[int] = field(default_factory=list)
    renewed: float = -math.inf


@dataclass
class _Unwritten:
    """Fields of a record that Redis did not take. choices: of a request that has ended, else 0."""

    fields: Fields
    choices: int = 0


class Records:
    """All records that this process writes.

    Creating a record is awaited and may fail: then the request is not accepted. Later writes never fail a request that
    is under way: they are logged and counted through `on_error`. Tokens go out in the background, all requests in one
    pipeline, at most every FLUSH_INTERVAL_S; while Redis is away up to MAX_PENDING_TOKENS wait for it, and the states
    of MAX_UNWRITTEN requests.
    """

    def __init__(
        self, url: str, *, owner: str, ttl_s: int, timeout_s: float, on_error: Callable[[], None] = lambda: None
    ) -> None:
        self.owner = owner
        self._ttl_s = ttl_s
        self._on_error = on_error
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=POOL_TIMEOUT_S,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),  # for a connection that was closed while it was idle
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._away = False
        self._closing = False
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._waiting_tokens = 0
        self._losers: set[str] = set()
        self._unwritten: dict[str, _Unwritten] = {}  # the oldest first
        self._writes: dict[str, asyncio.Task[bool]] = {}  # of the state "running", by request
        self._wake = asyncio.Event()
        self._flusher = asyncio.create_task(self._flush_until_closed())

    async def close(self) -> None:
        """Write what is pending and disconnect."""
        self._closing = True
        self._wake.set()
        await self._flusher  # not cancelled, for the same reason as in running()
        await asyncio.gather(*self._writes.values())
        await self._redis.aclose()

    async def ping(self) -> None:
        """RecordsUnavailable unless Redis answers."""
        try:
            await self._redis.ping()
        except (RedisError, OSError) as error:
            raise RecordsUnavailable(f"Redis does not answer: {error}") from error

    async def create(
        self,
        request_id: str,
        parameters: Mapping[str, object],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
    ) -> None:
        """Write the record of a queued request; RecordsUnavailable when it cannot be written."""
        fields: Fields = {
            "state": State.QUEUED,
            "owner": self.owner,
            "parameters": json.dumps(parameters),
            "prompts": json.dumps(prompts),
            "seeds": json.dumps(seeds),
            "created": time.time(),
        }
        try:
            await self._write(request_id, fields)
        except (RedisError, OSError) as error:
            raise RecordsUnavailable(f"the request's record cannot be written to Redis: {error}") from error

    async def running(self, request_id: str) -> None:
        """The verifier has admitted the request. May be cancelled at any time; the write goes on."""
        # redis-py swallows a cancellation that comes in the middle of a reply: it must not get one
        running = _Unwritten({"state": State.RUNNING})
        write = self._writes[request_id] = asyncio.create_task(self._write_or_keep(request_id, running))
        write.add_done_callback(lambda _: self._writes.pop(request_id))
        await asyncio.shield(write)

    def add_tokens(self, request_id: str, choice: int, token_ids: Sequence[int]) -> None:
        """Append to a choice's tokens, soon."""
        pending = self._pending.setdefault((request_id, choice), _Pending())
        pending.token_ids += token_ids
        self._waiting_tokens += len(token_ids)
        self._wake.set()

    async def end(
        self, request_id: str, choices: int, state: State, *, first_token: float | None, error: str | None = None
    ) -> None:
        """Write the last state, behind all tokens; `first_token` is its Unix time."""
        fields: Fields = {"state": state, "ended": time.time()}
        if first_token is not None:
            fields["first_token"] = first_token
        if error is not None:
            fields["error"] = error
        if (running := self._writes.get(request_id)) is not None:
            await asyncio.wait((running,))  # on another connection it could come behind
        await self._write_or_keep(request_id, _Unwritten(fields, choices))

    async def _write_or_keep(self, request_id: str, unwritten: _Unwritten) -> bool:
        """Write it in place of what is kept of the request; keep it for later, and say False, when Redis is away."""
        self._unwritten.pop(request_id, None)
        if await self._try(lambda: self._write_state(request_id, unwritten)):
            return True
        self._unwritten[request_id] = unwritten
        if len(self._unwritten) > MAX_UNWRITTEN:
            oldest = next(iter(self._unwritten))
            log.error("the end of a request is missing from its record", extra={"request": oldest})
            self._forget(oldest, self._unwritten.pop(oldest).choices)
        self._wake.set()
        return False

    async def _write_state(self, request_id: str, unwritten: _Unwritten) -> None:
        lost: Fields = {"tokens_lost": 1} if request_id in self._losers else {}
        await self._write(request_id, unwritten.fields | lost, unwritten.choices)
        if unwritten.choices:
            self._forget(request_id, unwritten.choices)

    def _forget(self, request_id: str, choices: int) -> None:
        """Of a request that has ended nothing is kept any more."""
        for choice in range(choices):
            left = self._pending.pop((request_id, choice), _Pending())
            self._waiting_tokens -= len(left.token_ids)
        self._losers.discard(request_id)

    async def _write(self, request_id: str, fields: Fields, choices: int = 0) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            for choice in range(choices):
                self._add_pending(pipeline, request_id, choice)
                pipeline.expire(tokens_key(request_id, choice), self._ttl_s)
            pipeline.hset(request_key(request_id), mapping=fields)
            pipeline.expire(request_key(request_id), self._ttl_s)
            await pipeline.execute()

    def _add_pending(self, pipeline: Pipeline, request_id: str, choice: int) -> int:
        """Put a choice's pending tokens into the pipeline; returns how many."""
        pending = self._pending.get((request_id, choice))
        if pending is None or not pending.token_ids:
            return 0
        packed = cast(str, pack_tokens(pending.token_ids))
        pipeline.setrange(tokens_key(request_id, choice), 4 * pending.offset, packed)
        return len(pending.token_ids)

    async def _flush_until_closed(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            if self._waiting_tokens:
                await self._try(self._flush)
            if self._waiting_tokens > MAX_PENDING_TOKENS:
                self._drop_pending()
            await self._write_kept()
            if self._waiting_tokens or self._unwritten:
                self._wake.set()
            if not self._closing:
                await asyncio.sleep(AWAY_INTERVAL_S if self._away else FLUSH_INTERVAL_S)
        if self._waiting_tokens:
            await self._try(self._flush)
        await self._write_kept()

    async def _write_kept(self) -> None:
        """The states that Redis did not take, until it refuses one, which comes last the next time."""
        for request_id, unwritten in list(self._unwritten.items()):
            if self._unwritten.get(request_id) is unwritten and not await self._write_or_keep(request_id, unwritten):
                return

    async def _flush(self) -> None:
        now = time.monotonic()
        due = {key for key, pending in self._pending.items() if now - pending.renewed > self._ttl_s / 4}
        async with self._redis.pipeline(transaction=False) as pipeline:
            sent = {key: self._add_pending(pipeline, *key) for key in self._pending}
            for request_id, choice in due:
                pipeline.expire(tokens_key(request_id, choice), self._ttl_s)
                pipeline.expire(request_key(request_id), self._ttl_s)
            await pipeline.execute()
        for key, count in sent.items():
            if pending := self._pending.get(key):  # unless the request ended meanwhile
                del pending.token_ids[:count]
                pending.offset += count
                self._waiting_tokens -= count
                if key in due:
                    pending.renewed = now

    def _drop_pending(self) -> None:
        """Forget tokens that cannot be written; their places stay empty and their records say so."""
        log.error("tokens dropped from request records", extra={"tokens": self._waiting_tokens})
        for (request_id, _), pending in self._pending.items():
            if pending.token_ids:
                self._losers.add(request_id)
            pending.offset += len(pending.token_ids)
            pending.token_ids.clear()
        self._waiting_tokens = 0

    async def _try(self, write: Callable[[], Awaitable[None]]) -> bool:
        """Whether Redis took it; if not, that is logged once and counted."""
        try:
            await write()
        except (RedisError, OSError) as error:
            self._on_error()
            if not self._away:
                log.error("Redis is away; requests go on, their records stand still", extra={"reason": str(error)})
            self._away = True
            return False
        if self._away:
            log.info("Redis is back")
        self._away = False
        return True
