"""Structured logs on stderr: lines for people or JSON for machines, through the standard logging module.

`log.info("request finished", extra={"tokens": 3})` writes the event and its fields.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Literal

_REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's copy of the message for terminals
}


@contextmanager
def request_id(value: str) -> Iterator[None]:
    """Adds `request_id` to every line that this task logs inside."""
    token = _REQUEST_ID.set(value)
    try:
        yield
    finally:
        _REQUEST_ID.reset(token)


class _Formatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if (request := _REQUEST_ID.get()) is not None:
            extra.setdefault("request_id", request)
        return extra

    def time(self, record: logging.LogRecord) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(_Formatter):
    """One JSON object a line: time (UTC), level, service, logger, event, the fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.time(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in self.fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class ConsoleFormatter(_Formatter):
    """time level service: event key=value ..., and the traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={self._value(value)}" for key, value in self.fields(record).items())
        clock = self.time(record)[11:23]
        line = f"{clock} {record.levelname:<7} {self._service}: {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    @staticmethod
    def _value(value: object) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n') else text


def configure_logs(
    service: str, level: str, style: Literal["console", "json"], stream: IO[str] | None = None
) -> logging.Handler:
    """Sends everything that is logged from `level` on to `stream` (stderr when None); returns the handler.

    Replaces what was configured before, so the last call wins.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(service) if style == "json" else ConsoleFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    return handler
