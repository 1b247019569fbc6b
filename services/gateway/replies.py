"""How a completion goes out over HTTP: at once or as it comes."""

from __future__ import annotations

from typing import Protocol

from starlette.types import Message, Send

from services.gateway.choice import Delta
from services.gateway.completions import Usage
from services.gateway.errors import ApiError
from services.gateway.responses import DONE_EVENT, ResponseWriter, event, to_json


class Reply(Protocol):
    """Where the pieces of a completion go."""

    async def start(self) -> None:
        """The request is admitted."""

    async def piece(self, index: int, delta: Delta) -> None:
        """The next piece of a choice."""

    async def finish(self, usage: Usage) -> None:
        """All choices are complete."""

    async def fail(self, error: ApiError) -> None:
        """There is no more, for this reason."""


class JsonReply:
    """One JSON object at the end."""

    def __init__(self, send: Send, writer: ResponseWriter, choices: int) -> None:
        self._send = send
        self._writer = writer
        self._choices: list[list[Delta]] = [[] for _ in range(choices)]

    async def start(self) -> None:
        """Nothing is sent before the end."""

    async def piece(self, index: int, delta: Delta) -> None:
        self._choices[index].append(delta)

    async def finish(self, usage: Usage) -> None:
        await send_json(self._send, 200, self._writer.response(self._choices, usage))

    async def fail(self, error: ApiError) -> None:
        await send_error(self._send, error)


class EventReply:
    """Server-sent events, one choice in each; a failure in mid-stream is an event, too, and the last one."""

    def __init__(self, send: Send, writer: ResponseWriter) -> None:
        self._send = send
        self._writer = writer
        self._started = False

    async def start(self) -> None:
        self._started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ],
            }
        )

    async def piece(self, index: int, delta: Delta) -> None:
        if delta.text or delta.reports or delta.finish_reason is not None:
            await self._send(_body(event(self._writer.chunk(index, delta)), more=True))

    async def finish(self, usage: Usage) -> None:
        tail = event(self._writer.usage_chunk(usage)) if self._writer.include_usage else b""
        await self._send(_body(tail + DONE_EVENT))

    async def fail(self, error: ApiError) -> None:
        if self._started:
            await self._send(_body(event(error.body())))
        else:
            await send_error(self._send, error)


def _body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def send_json(send: Send, status: int, value: object, headers: dict[str, str] | None = None) -> None:
    """Send a whole response."""
    data = to_json(value)
    fields = {"content-type": "application/json", "content-length": str(len(data))} | (headers or {})
    encoded = [(name.encode(), text.encode()) for name, text in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send(_body(data))


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error as the whole response."""
    await send_json(send, error.status, error.body(), dict(error.headers))
