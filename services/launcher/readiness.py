"""How the launcher learns that a child is usable, and that one which runs still answers."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Protocol

import httpx
import redis.asyncio
from redis.exceptions import RedisError

from services.common.grpc_setup import aio_channel, health_status, is_serving
from services.common.tls import INSECURE

PROBE_TIMEOUT_S = 2.0


class Probe(Protocol):
    """A question to a service: None when all is well, else what is missing, in a few words."""

    async def __call__(self, timeout_s: float = PROBE_TIMEOUT_S) -> str | None: ...


def grpc_probe(address: str) -> Probe:
    """Asks the health service of HOST:PORT, without TLS; SERVING is ready."""

    async def probe(timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        async with aio_channel(address, INSECURE) as connection:
            return None if await is_serving(connection, timeout_s=timeout_s) else f"{address} is not serving yet"

    return probe


def grpc_alive_probe(address: str) -> Probe:
    """Asks like grpc_probe(); every answer is one, also that of a service which drains."""

    async def probe(timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        async with aio_channel(address, INSECURE) as connection:
            # Without waiting, a process that is slow to accept the connection would fail the probe within 0.1 s.
            status = await health_status(connection, timeout_s=timeout_s, wait_for_ready=True)
        return f"{address} does not answer" if status is None else None

    return probe


def http_probe(url: str) -> Probe:
    """GETs the URL; 200 is well, the body of another answer says what is missing."""
    trusted = ssl.create_default_context()  # takes longer than the question itself, so that one serves all

    async def probe(timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        try:
            async with httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=trusted) as client:
                response = await client.get(url)
        except httpx.HTTPError as error:
            return f"{url}: {type(error).__name__}"
        if response.status_code == httpx.codes.OK:
            return None
        try:
            reason = json.dumps(response.json())
        except ValueError:
            reason = response.text
        return f"{url}: {response.status_code} {reason[:200]}"

    return probe


def redis_probe(url: str) -> Probe:
    """Sends PING."""

    async def probe(timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        client = redis.asyncio.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        try:
            await asyncio.wait_for(client.ping(), timeout_s)
        except (RedisError, OSError, TimeoutError) as error:
            return f"{url}: {error}"
        finally:
            await client.aclose()
        return None

    return probe
