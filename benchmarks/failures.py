"""How a benchmark ends when it cannot go on: one line, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from benchmarks.client import RequestFailed
from services.common.model_files import ModelFilesError
from services.common.settings import SettingsError
from services.launcher.redis_server import NoRedisServer
from services.launcher.supervisor import ServiceFailed

STACK_FAILURES = (ServiceFailed, NoRedisServer, ModelFilesError, SettingsError, RequestFailed)
"""What a running stack and its clients may meet."""


@contextmanager
def exit_on(failures: tuple[type[Exception], ...], console: Console, code: int = 1) -> Iterator[None]:
    """Say what failed and leave the command with `code`; anything else is a fault of the benchmark's own."""
    try:
        yield
    except failures as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(code) from None
