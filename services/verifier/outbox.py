"""From other threads to the queues of an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any


class Outbox:
    """Wakes the loop once for all that is put until it comes to it: waking costs more than passing on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._entries: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._lock = threading.Lock()
        self._woken = False

    def put(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Put an item into a queue of the loop, from any thread, in the order of the calls."""
        with self._lock:
            self._entries.append((queue, item))
            wake, self._woken = not self._woken, True
        if wake:
            self._loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        with self._lock:
            entries, self._entries = self._entries, deque()
            self._woken = False
        for queue, item in entries:
            queue.put_nowait(item)
