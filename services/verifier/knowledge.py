"""What a budget has learned, kept over restarts, so that the first requests of the next start profit from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.verifier.kept_file import KeptFile
from services.verifier.measured_budget import MeasuredBudget

VERSION = 6
EVERY_S = 60.0
# What is kept counts so much as if it had just been measured: the machine may have changed, which is noticed soon.
SHARE = 0.25


class Knowledge:
    """A budget, and the file that it starts from and goes back to."""

    def __init__(self, file: KeptFile, new: Callable[[], MeasuredBudget]) -> None:
        """new: makes a budget that knows nothing."""

        def informed(document: dict[str, Any]) -> MeasuredBudget:
            budget = new()
            budget.restore(document["learned"], SHARE)
            return budget

        self.file = file
        self.budget = file.read(informed) or new()
        self._written = self.budget.state()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Writes the file now and then, and at the end."""
        writing = asyncio.create_task(self._keep_writing())
        try:
            yield
        finally:
            writing.cancel()
            await asyncio.to_thread(self.write)

    def write(self) -> None:
        """Not when nothing was learned since: what is read again and again would fade."""
        if (state := self.budget.state()) != self._written:
            self.file.write({"learned": state})
            self._written = state

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await asyncio.to_thread(self.write)
