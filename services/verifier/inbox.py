"""What other threads hand the engine: requests, cancellations, and the word that it is to end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from services.verifier.request import EngineStopped, GenerationRequest, QueueFull, Sink


@dataclass(frozen=True)
class Arrival:
    """A request that was queued, and what takes its outputs. id: for `cancel`."""

    id: int
    request: GenerationRequest
    sink: Sink


@dataclass(frozen=True)
class Mail:
    """What has come since the last was taken. closed: whether nothing comes any more."""

    arrivals: Sequence[Arrival]
    cancelled: AbstractSet[int]
    closed: bool


class Inbox:
    """Any thread puts, the engine's takes.

    most: requests that may wait. waiting: how many the engine has taken that still do.
    """

    def __init__(self, most: int, waiting: Callable[[], int]) -> None:
        self._most = most
        self._waiting = waiting
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._arrivals: list[Arrival] = []
        self._cancelled: set[int] = set()
        self._closed = False

    def put(self, request: GenerationRequest, sink: Sink, retry_after_ms: int) -> int:
        """Queue a request; return its id.

        Raises:
            QueueFull: too many are waiting. EngineStopped: the inbox is closed.
        """
        with self._changed:
            if self._closed:
                raise EngineStopped("the verifier is stopping and takes no requests")
            waiting = len(self._arrivals) + self._waiting()
            if waiting >= self._most:
                raise QueueFull(waiting, retry_after_ms)
            arrival = Arrival(next(self._ids), request, sink)
            self._arrivals.append(arrival)
            self._changed.notify()
        return arrival.id

    def cancel(self, sequence_id: int) -> None:
        with self._changed:
            self._cancelled.add(sequence_id)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, *, wait: bool = False) -> Mail:
        """What has come; with `wait`, once something has."""
        with self._changed:
            while wait and not (self._arrivals or self._cancelled or self._closed):
                self._changed.wait()
            arrivals, self._arrivals = self._arrivals, []
            cancelled, self._cancelled = self._cancelled, set()
            return Mail(arrivals, cancelled, self._closed)
