"""How the launcher learns that a child is usable."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import redis.asyncio
from redis.exceptions import RedisError

from services.common.grpc_setup import aio_channel, is_serving
from services.common.tls import INSECURE

# None when ready, else what is missing, in a few words.
Probe = Callable[[], Coroutine[Any, Any, str | None]]

PROBE_TIMEOUT_S = 2.0


def grpc_probe(address: str) -> Probe:
    """Asks the health service of HOST:PORT, without TLS."""

    async def probe() -> str | None:
        async with aio_channel(address, INSECURE) as connection:
            return None if await is_serving(connection, timeout_s=PROBE_TIMEOUT_S) else f"{address} is not serving yet"

    return probe


def http_probe(url: str) -> Probe:
    """GETs the URL; 200 is ready, the body of another answer says what is missing."""

    async def probe() -> str | None:
        try:
            async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
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

    async def probe() -> str | None:
        client = redis.asyncio.Redis.from_url(
            url, socket_timeout=PROBE_TIMEOUT_S, socket_connect_timeout=PROBE_TIMEOUT_S
        )
        try:
            await asyncio.wait_for(client.ping(), PROBE_TIMEOUT_S)
        except (RedisError, OSError, TimeoutError) as error:
            return f"{url}: {error}"
        finally:
            await client.aclose()
        return None

    return probe
